"""images + concepts -> labels: the pseudo-label bank, one row per image."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.labels.bank import encode_scores
from transfgu_ray.algorithms.labels.cam import GradientResponse
from transfgu_ray.algorithms.labels.labeller import Labeller, Response
from transfgu_ray.algorithms.labels.window_votes import WindowVotes
from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.halving import halved
from transfgu_ray.engine.parts import PartStats, PartWorker, batched_rows, decode_photos, require_finite, require_some
from transfgu_ray.engine.stream import Photo
from transfgu_ray.images import to_working
from transfgu_ray.models.weights import load_run_encoder
from transfgu_ray.pipeline.concepts import read_concepts
from transfgu_ray.pipeline.context import StageJob, table_content, table_of_photographs
from transfgu_ray.runs.tables import build_table, labels_schema
from transfgu_ray.storage import Folder


def run_stage(job: StageJob) -> dict[str, Any]:
    """Write the pseudo-label bank; return the content of the manifest."""
    result = table_of_photographs(job, "labels", worker=BankBuilder, root_uri=job.root.uri)
    require_some(result.stats, len(job.listing.images))
    return table_content(job.listing, result) | {"weights_sha256": job.run.require("extract")["weights_sha256"]}


def _gradient(
    config: RunConfig, encoder: Encoder, *, centroids: torch.Tensor, is_background: torch.Tensor | None
) -> Response:
    cam = config.cam
    return GradientResponse(
        encoder=encoder,
        centroids=centroids,
        gradient_scale=cam.gradient_scale,
        keep_mass=cam.keep_mass,
        zeroed=cam.zeroed,
    )


def _windows(
    config: RunConfig, encoder: Encoder, *, centroids: torch.Tensor, is_background: torch.Tensor | None
) -> Response:
    return WindowVotes(
        encoder=encoder,
        centroids=centroids,
        is_background=is_background,
        window_fracs=config.extract.window_fracs,
        crop_size=config.extract_crop_size,
    )


# By the values of `cam.response`.
RESPONSES: dict[str, Callable[..., Response]] = {
    "gradient": _gradient,
    "windows": _windows,
}


def load_labeller(run_folder: Folder, config: RunConfig, device: str) -> Labeller:
    """Load the labeller of a run that has its encoder and concepts."""
    encoder = load_run_encoder(run_folder, config.encoder.precision, device)
    kinds, centroids = read_concepts(run_folder)
    voting = config.cam.response == "windows"
    on_device = torch.from_numpy(centroids).to(device)
    # With votes some concept wins everywhere, so Eq. 8 finds a background only if concepts are excluded there.
    excluding = config.cam.exclusion and (
        config.region_mode == "things_and_stuff" or (voting and config.has_background)
    )
    is_background = torch.tensor([k == "background" for k in kinds], device=device) if excluding else None
    return Labeller(
        encoder=encoder,
        response=RESPONSES[config.cam.response](config, encoder, centroids=on_device, is_background=is_background),
        is_background=is_background,
        foreground_prior="all" if config.region_mode == "all_foreground" else config.extract.foreground_prior,
    )


class BankBuilder(PartWorker):
    """A worker: one unit of photographs -> its rows of the bank, which training reads one by one."""

    rows_apart = True

    def __init__(self, config: RunConfig, run_uri: str, *, root_uri: str, **part: Any) -> None:
        super().__init__(config, run_uri, **part)
        self._root = Folder(root_uri)
        self._labeller = load_labeller(self.run_folder, config, self.device)

    @staticmethod
    def photograph_bytes(config: RunConfig) -> int:
        """Return the bytes of the scores, which zstd halves, on patches of 8 px."""
        height, width = config.cam_image_size
        return max(1, config.num_concepts * height * width // (2 * 8**2))

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Write the unit."""
        config, stats = self.config, PartStats()
        columns: dict[str, list[Any]] = {field.name: [] for field in labels_schema()}
        working = []
        for photo, image in decode_photos(self.signed(photos), stats, limits=config.data):
            columns["image_id"].append(photo.image_id)
            columns["path"].append(self._root.uri_of(photo.place or photo.image_id))
            columns["height_px"].append(image.height)
            columns["width_px"].append(image.width)
            working.append(to_working(image, config.cam_image_size, config.cam_resample))
        for _, batch in self.signed(batched_rows(np.array(working), config.cam.batch_size)):
            for scores, foreground in halved(self._labeller, torch.from_numpy(batch).to(self.device), stats.halve):
                begun = columns["image_id"][len(columns["grid_h"]) :]
                require_finite(scores.amax((2, 3)).cpu().numpy(), begun[: len(scores)], "scores")
                grid_h, grid_w = foreground.shape[1:]
                columns["grid_h"] += [grid_h] * len(scores)
                columns["grid_w"] += [grid_w] * len(scores)
                for name, values in zip(("scores", "low", "high"), encode_scores(scores), strict=True):
                    columns[name] += [image.tobytes() for image in values.cpu().numpy()]
                columns["foreground"] += [mask.tobytes() for mask in foreground.to(torch.uint8).cpu().numpy()]
        table: pa.Table = build_table(columns, labels_schema())
        return self.write(unit, table, stats=stats)
