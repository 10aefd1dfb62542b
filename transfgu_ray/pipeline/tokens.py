"""images -> tokens: the decoder's input for whole photographs, so that training can crop tokens, not photographs."""

from typing import Any

import numpy as np
import torch

from transfgu_ray.algorithms.encoder.tokens import read_tokens
from transfgu_ray.algorithms.rounds.token_crops import encode_tokens
from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.parts import PartStats, PartWorker, batched_rows, decode_photos
from transfgu_ray.engine.stream import Photo
from transfgu_ray.images import to_working
from transfgu_ray.models.weights import (
    BACKBONE,
    load_run_backbone,
    load_run_encoder,
)
from transfgu_ray.pipeline.context import StageJob, table_content, table_of_photographs
from transfgu_ray.pipeline.train_data import TOKENS, changed_since_labelled
from transfgu_ray.runs.index import read_index
from transfgu_ray.runs.references import table_folder
from transfgu_ray.runs.tables import build_table, tokens_schema

# Of ViT-S.
_TOKEN_WIDTH = 384


def run_stage(job: StageJob) -> dict[str, Any]:
    """Write the tokens of whole photographs; return the content of the manifest."""
    if job.backbone is not None:
        job.folder.write_bytes(BACKBONE, job.backbone)
    result = table_of_photographs(job, TOKENS, worker=TokenCacher)
    num_bytes = sum(size for _, size in job.folder.files(TOKENS))
    return table_content(job.listing, result) | {"bytes": num_bytes}


class TokenCacher(PartWorker):
    """A worker: one unit of photographs -> its rows of the token table, the same as in the bank.

    Training reads them one by one.
    """

    rows_apart = True

    def __init__(self, config: RunConfig, run_uri: str, **part: Any) -> None:
        super().__init__(config, run_uri, **part)
        self._encoder = load_run_encoder(self.run_folder, config.encoder.precision, self.device)
        self._bank = read_index(table_folder(self.run_folder, "labels"), "labels")
        self._backbone = load_run_backbone(self.run_folder, config, self.device)

    @staticmethod
    def photograph_bytes(config: RunConfig) -> int:
        """Return the bytes of the tokens of ViT-S on patches of 8 px."""
        height, width = config.train_crop_size
        return max(1, 2 * _TOKEN_WIDTH * height * width // 8**2)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Write the unit.

        Raises:
            DataError: a photograph of the bank is missing or cannot be used any more.
        """
        config, stats = self.config, PartStats()
        banked = self._bank.image_ids_of(unit)
        image_ids, working = [], []
        for photo, image in decode_photos(self.signed(_only(banked, photos, stats)), stats, limits=config.data):
            image_ids.append(photo.image_id)
            working.append(to_working(image, config.train_crop_size, config.data.resample))
        _check_complete(banked, image_ids, stats)
        tokens: list[bytes] = []
        for _, batch in self.signed(batched_rows(np.array(working), config.cam.batch_size)):
            images = torch.from_numpy(batch).to(self.device)
            found = read_tokens(self._encoder, images, window=config.train.token_window, backbone=self._backbone)
            tokens += map(encode_tokens, found.cpu().numpy())
        grid_h, grid_w = self._encoder.grid_hw(config.train_crop_size)
        columns = {
            "image_id": image_ids,
            "grid_h": [grid_h] * len(image_ids),
            "grid_w": [grid_w] * len(image_ids),
            "tokens": tokens,
        }
        return self.write(unit, build_table(columns, tokens_schema()), stats=stats)


def _only(banked: list[str], photos: list[Photo], stats: PartStats) -> list[Photo]:
    """Return the photographs that the bank has; record the others as refused, whether readable by now or not."""
    reason = "not in the bank: it could not be used when the bank was labelled"
    known = set(banked)
    others = [photo.image_id for photo in photos if photo.image_id not in known]
    stats.refused += [{"image_id": image_id, "reason": reason} for image_id in others]
    return [photo for photo in photos if photo.image_id in known]


def _check_complete(banked: list[str], image_ids: list[str], stats: PartStats) -> None:
    if image_ids == banked:
        return
    now = {refusal["image_id"]: refusal["reason"] for refusal in stats.refused}
    (image_id, *_) = sorted(set(banked) - set(image_ids))
    raise changed_since_labelled(image_id, now.get(image_id, "not listed"))
