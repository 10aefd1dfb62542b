"""images -> features: class tokens of sliding windows, with crops batched across the photographs of a unit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transfgu_ray.algorithms.concepts.windows import (
    DROPPED,
    classify_regions,
    classify_windows,
    enumerate_patch_windows,
    enumerate_windows,
    foreground_fracs,
    region_boxes,
    to_original,
)
from transfgu_ray.algorithms.encoder.vit import above_mean
from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.halving import halved
from transfgu_ray.engine.parts import PartStats, PartWorker, batched_rows, decode_labelled, require_finite, require_some
from transfgu_ray.engine.prefetch import made_ahead
from transfgu_ray.engine.session import cores_per_gpu, own_node
from transfgu_ray.engine.stream import Photo
from transfgu_ray.errors import DataError
from transfgu_ray.images import cut_crops, resize_label, to_working
from transfgu_ray.models.weights import ENCODER, load_run_encoder, weights_file_sha256
from transfgu_ray.pipeline.context import StageJob, table_content, table_of_photographs
from transfgu_ray.pipeline.inputs import list_clustered
from transfgu_ray.runs.tables import build_table, features_schema

# Of a row of the features, for ViT-S.
_TOKEN_BYTES = 828


def run_stage(job: StageJob) -> dict[str, Any]:
    """Write the class tokens of all windows, and the encoder; return the content of the manifest."""
    from transfgu_ray.algorithms.encoder.checkpoints import read_safetensors

    config = job.config
    # Written once: all workers and the finished model read this file.
    assert job.encoder is not None
    job.folder.write_bytes(ENCODER, job.encoder)
    listing = list_clustered(config) or job.listing
    result = table_of_photographs(job, "features", worker=FeatureExtractor, listing=listing)
    require_some(result.stats, len(listing.images))
    content = table_content(listing, result)
    _require_most(content, config.runtime.max_refused_share)
    return content | {
        "weights_sha256": read_safetensors(job.encoder, ENCODER)[1]["weights_sha256"],
        "weights_file_sha256": weights_file_sha256(config.encoder),
        "passed_over": dict(listing.passed_over),
    }


def _require_most(content: Mapping[str, Any], max_refused_share: float) -> None:
    """Refuse a table from which too many photographs were refused.

    Raises:
        DataError: the refused share is above `max_refused_share`.
    """
    num_refused, total = len(content["refused"]), content["rows_in"]
    if num_refused > max_refused_share * total:
        reasons = sorted(content["refused_by_reason"].items(), key=lambda item: -item[1])
        raise DataError(
            f"{num_refused} of {total} photographs were refused, more than runtime.max_refused_share="
            f"{max_refused_share} allows: {', '.join(f'{count} x {reason}' for reason, count in reasons)}; repair "
            "them, or raise that setting and run the same command again"
        )


@dataclass(frozen=True)
class _Windows:
    """The kept windows of one working image: number, box in px, beta, kind and foreground share of each."""

    crop_ids: np.ndarray
    boxes: np.ndarray
    window_fracs: np.ndarray
    kinds: list[str]
    foreground_fracs: np.ndarray


def _column(windows: list[_Windows], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0), *(getattr(of_image, name) for of_image in windows)]).astype(dtype)


class FeatureExtractor(PartWorker):
    """A worker: one unit of photographs -> its rows of the features table."""

    @staticmethod
    def photograph_bytes(config: RunConfig) -> int:
        """Return the bytes of a class token of ViT-S for each of the windows of half steps."""
        return _TOKEN_BYTES * len(enumerate_windows(*config.data.image_size, config.extract.window_fracs)[0])

    def __init__(self, config: RunConfig, run_uri: str, **part: Any) -> None:
        super().__init__(config, run_uri, **part)
        self._encoder = load_run_encoder(self.run_folder, config.encoder.precision, self.device)
        height, width = config.data.image_size
        self._crop_size = config.extract_crop_size
        # Whole images are larger than crops: batch as many as have about the same number of pixels.
        self._image_batch = max(1, config.extract.batch_size * self._crop_size**2 // (height * width))
        fracs, grid_hw = config.extract.window_fracs, self._encoder.grid_hw((height, width))
        self._boxes, self._fracs = (
            enumerate_windows(height, width, fracs)
            if config.extract.window_layout == "half_steps"
            else enumerate_patch_windows(grid_hw, self._encoder.patch_size, fracs)
        )
        self._label_table = config.label_table if config.extract.windows == "ground_truth" else None
        # A GPU encodes crops faster than one core cuts them; on a CPU the encoder needs the cores itself.
        on_gpu = self.device == "cuda"
        self._num_cutters = cores_per_gpu(own_node()) if on_gpu else 1

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Write the unit."""
        config, stats = self.config, PartStats()
        image_ids, sizes, working, labels = [], [], [], []
        for photo, image, classes in decode_labelled(
            self.signed(photos), stats, limits=config.data, table=self._label_table
        ):
            if classes is not None:
                labels.append(resize_label(classes, config.data.image_size))
            image_ids.append(photo.image_id)
            sizes.append((image.height, image.width))
            working.append(to_working(image, config.data.image_size, config.extract_resample))
        windows = self._regions(labels, stats) if labels else self._sliding(working, stats)
        kept = [(i, c) for i, of_image in enumerate(windows) for c in range(len(of_image.kinds))]
        tokens = np.empty((len(kept), self._encoder.embed_dim), dtype=np.float16)
        batches = self.signed(batched_rows(np.array(kept).reshape(-1, 2), config.extract.batch_size))
        boxes = [of_image.boxes for of_image in windows]
        for rows, crops in made_ahead(lambda b: (b[0], self._crops(working, boxes, b[1])), batches, self._num_cutters):
            on_device = crops.to(self.device, non_blocking=True)
            tokens[rows] = np.concatenate(
                [part.cpu().numpy() for part in halved(self._encoder.cls_tokens, on_device, stats.halve)]
            )
        require_finite(tokens, [image_ids[i] for i, _ in kept], "class tokens")
        original = [
            to_original(of_image, config.data.image_size, size) for of_image, size in zip(boxes, sizes, strict=True)
        ]
        table = build_table(
            {
                "image_id": [image_ids[i] for i, _ in kept],
                "crop_id": _column(windows, "crop_ids", np.int32),
                "box_xyxy": np.concatenate([*original, np.empty((0, 4))]).astype(np.int32),
                "window_frac": _column(windows, "window_fracs", np.float32),
                "kind": [kind for of_image in windows for kind in of_image.kinds],
                "foreground_frac": _column(windows, "foreground_fracs", np.float32),
                "cls_token": tokens,
            },
            features_schema(self._encoder.embed_dim),
        )
        return self.write(unit, table, stats=stats)

    def _kinds(self, fracs: np.ndarray) -> list[str]:
        """Return the kind of each window, by its foreground share."""
        extract = self.config.extract
        return classify_windows(
            fracs,
            self.config.region_mode,
            foreground_min_frac=extract.foreground_min_frac,
            background_min_frac=extract.background_min_frac,
        )

    def _sliding(self, working: list[np.ndarray], stats: PartStats) -> list[_Windows]:
        """Return the sliding windows kept of each working image (4.2)."""
        found = []
        for fracs in self._foreground_fracs(np.array(working)) if working else []:
            kinds = self._kinds(fracs)
            keep = np.flatnonzero([kind != DROPPED for kind in kinds])
            stats.drop("neither foreground nor background", len(kinds) - len(keep))
            found.append(_Windows(keep, self._boxes[keep], self._fracs[keep], [kinds[c] for c in keep], fracs[keep]))
        return found

    def _regions(self, labels: list[np.ndarray], stats: PartStats) -> list[_Windows]:
        """Return the labelled regions kept of each working image, from its classes."""
        config, found = self.config, []
        things = np.array([kind == "thing" for kind in config.class_kinds])
        for classes in labels:
            boxes, class_ids, num_small = region_boxes(classes)
            kinds = classify_regions(things[class_ids], config.region_mode)
            keep = np.flatnonzero([kind != DROPPED for kind in kinds])
            stats.drop("labelled region below 1/400 of the image", num_small)
            stats.drop("labelled region of the background", len(kinds) - len(keep))
            sides = (boxes[keep, 2:] - boxes[keep, :2]).astype(np.float64)
            fracs = np.sqrt(sides.prod(1)) / min(config.data.image_size)
            found.append(
                _Windows(keep, boxes[keep], fracs, [kinds[c] for c in keep], things[class_ids[keep]].astype(np.float64))
            )
        return found

    @property
    def embed_dim(self) -> int:
        """Return the width of a class token."""
        return self._encoder.embed_dim

    def time_pieces(
        self, working: np.ndarray, seconds_per_item: Callable[[Callable[[int], object], int], float]
    ) -> dict[str, float]:
        """Measure the seconds to cut a crop, to encode it, and to find the foreground of a photograph.

        Also return the number of windows per photograph, total and kept.

        Args:
            working: working images (b, 3, y, x).
            seconds_per_item: times a function of an item count, given the largest count.
        """
        most = self.config.extract.batch_size
        fracs = list(self._foreground_fracs(working))
        kept = sum(kind != DROPPED for of_image in fracs for kind in self._kinds(of_image))
        pairs = np.array([(0, c % len(self._boxes)) for c in range(most)])
        boxes = [self._boxes]
        crops = self._crops(list(working), boxes, pairs).to(self.device)
        return {
            "windows": len(self._boxes),
            "kept_windows": kept / len(working),
            "cut": seconds_per_item(lambda count: self._crops(list(working), boxes, pairs[:count]), most),
            "crop": seconds_per_item(lambda count: self._encoder.cls_tokens(crops[:count]).cpu(), most),
            "foreground": seconds_per_item(
                lambda count: list(self._foreground_fracs(np.resize(working, (count, *working.shape[1:])))),
                self._image_batch,
            ),
        }

    def _foreground_fracs(self, working: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the foreground share of every window of each working image."""
        encoder, config = self._encoder, self.config
        grid_hw = encoder.grid_hw(config.data.image_size)
        if config.region_mode in ("all_foreground", "no_prior"):
            yield from np.ones((len(working), len(self._boxes)))
            return
        for _, batch in self.signed(batched_rows(working, self._image_batch)):
            tokens = encoder.prefix(self._host_tensor(batch).to(self.device, non_blocking=True))
            saliency = encoder.saliency(
                tokens, encoder.class_row(tokens, grid_hw), grid_hw=grid_hw, prior=config.extract.foreground_prior
            )
            for mask in above_mean(saliency).cpu().numpy():
                yield foreground_fracs(self._boxes, mask, encoder.patch_size)

    def _crops(self, working: list[np.ndarray], boxes: list[np.ndarray], pairs: np.ndarray) -> torch.Tensor:
        crops = [
            cut_crops(working[i], boxes[i][c : c + 1], self._crop_size, self.config.data.resample)[0] for i, c in pairs
        ]
        return self._host_tensor(np.stack(crops))

    def _host_tensor(self, images: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(images)
        return batch.pin_memory() if self.device == "cuda" else batch
