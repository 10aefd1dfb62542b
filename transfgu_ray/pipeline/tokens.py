"""images -> tokens: what the decoder reads of whole photographs, for a training that crops tokens, not photographs."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from transfgu_ray.algorithms.encoder.tokens import read_tokens
from transfgu_ray.algorithms.rounds.token_crops import encode_tokens
from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.parts import PartStats, PartWorker, batched_rows, decode_photos, part_name, read_part
from transfgu_ray.engine.stream import Photo
from transfgu_ray.errors import DataError
from transfgu_ray.images import to_working
from transfgu_ray.models.weights import (
    load_run_backbone,
    load_run_encoder,
)
from transfgu_ray.pipeline.context import Context, table_of_photographs
from transfgu_ray.runs.tables import build_table, tokens_schema
from transfgu_ray.storage import Folder


def build_tokens(context: Context) -> tuple[dict[str, int], int]:
    """Brings the table of cached tokens up to date; what the manifest says of it, and a worker's peak memory, MB."""
    from transfgu_ray.pipeline.samples import TOKENS

    tokens = replace(context, fingerprint=context.run.tokens_fingerprint(context.inputs))
    table = table_of_photographs(tokens, TOKENS, TokenCacher)
    num_bytes = sum(size for _, size in context.run.folder.files(TOKENS))
    return {"bytes": num_bytes, "parts": table.num_parts, "parts_resumed": table.num_resumed}, table.peak_mb


class TokenCacher(PartWorker):
    """One unit of photographs -> one part of the token table, row by row the photographs of the bank's part.

    One row a row group, so that training reads single images.
    """

    def __init__(self, config: dict[str, Any], **part: Any) -> None:
        super().__init__(**part)
        self._config = RunConfig.model_validate(config)
        self._run = Folder(part["run_uri"])
        self._encoder = load_run_encoder(self._run, self._config.encoder.precision, self.device)
        self._backbone = load_run_backbone(self._run, self._config, self.device)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Writes the unit's part.

        Raises:
            DataError: other photographs can be read than when the bank was made.
        """
        config, stats = self._config, PartStats()
        image_ids, working = [], []
        for photo, image in decode_photos(photos, config.data.min_side_px, config.data.max_pixels, stats):
            image_ids.append(photo.image_id)
            working.append(to_working(image, config.train_crop_size))
        self._check_as_in_the_bank(unit, image_ids, stats)
        tokens: list[bytes] = []
        for _, batch in batched_rows(np.array(working), config.cam.batch_size):
            images = torch.from_numpy(batch).to(self.device)
            found = read_tokens(self._encoder, images, config.train.token_window, self._backbone)
            tokens += map(encode_tokens, found.cpu().numpy())
        grid_h, grid_w = self._encoder.grid_hw(config.train_crop_size)
        columns = {
            "image_id": image_ids,
            "grid_h": [grid_h] * len(image_ids),
            "grid_w": [grid_w] * len(image_ids),
            "tokens": tokens,
        }
        return self.write(unit, build_table(columns, tokens_schema()), stats, row_group_size=1)

    def _check_as_in_the_bank(self, unit: int, image_ids: list[str], stats: PartStats) -> None:
        labelled = read_part(self._run, part_name("labels", unit), ["image_id"])["image_id"].to_pylist()
        if image_ids == labelled:
            return
        (image_id, *_) = sorted(set(image_ids) ^ set(labelled))
        now = {refusal["image_id"]: refusal["reason"] for refusal in stats.refused}.get(image_id, "readable")
        raise DataError(
            f"{image_id} is not as it was when the bank was labelled (now: {now}); restore it or use another run folder"
        )
