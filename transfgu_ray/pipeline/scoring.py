"""Photographs, labels and the masks of any method -> confusion matrices and sample masks, one unit at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_array

from transfgu_ray.algorithms.scores.intervals import photo_counts, stack_counts
from transfgu_ray.algorithms.scores.metrics import IGNORE, confusion_matrix
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.build import TableResult, build_table_of_parts
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import (
    PartStats,
    PartWorker,
    batched_rows,
    decode_labelled,
    part_files,
    read_part,
)
from transfgu_ray.engine.stream import Photo
from transfgu_ray.images import centre_crop, encode, resize_label, to_working
from transfgu_ray.models.model import SegmentationModel, load_model_config
from transfgu_ray.runs.tables import build_table, confusions_schema
from transfgu_ray.storage import Folder

CONFUSIONS = "confusions"
# The photographs with the best and the worst scores, segmented again to be shown.
EXTREMES = "extremes"
_PHOTOS_PER_UNIT = 16
# How the published code resizes photographs before the centre crop; labels always use nearest neighbour.
_RESAMPLING = {"picie": Image.Resampling.BILINEAR, "stego": Image.Resampling.NEAREST}
# Longest side of the masks and photographs shown, px.
_SAMPLE_PX = 480


class Scorer(PartWorker):
    """A worker: one unit of photographs -> its rows of the table of confusions, and the masks of samples.

    Subclasses implement `predict`, and list in `shown` the methods whose masks go into samples. The run folder must
    hold a model.
    """

    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, config: RunConfig, run_uri: str, *, num_classes: int, samples: Mapping[str, str], **part: Any
    ) -> None:
        super().__init__(config, run_uri, **part)
        self._num_classes = num_classes
        self._num_concepts = len(load_model_config(Folder(self.run_folder.uri_of("model"))).kinds)
        # Without classes nothing is scored, so no labels are read.
        self._label_table = self.config.label_table if num_classes else None
        self._samples = samples

    def predict(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        """Return the mask of each method for each image, at the scored size."""
        raise NotImplementedError

    def sample_maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Return further maps to store for a sample, on any grid: class ids, or shares 0-255."""
        return {}

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Write the unit's samples, then its rows; without classes nothing is counted."""
        stats, limits = PartStats(), self.config.data
        image_ids, images, targets = [], [], []
        decoded = decode_labelled(self.signed(photos), stats, limits=limits, table=self._label_table)
        for photo, image, target in decoded:
            image, target = frame(image, target, self.config)
            image_ids.append(photo.image_id)
            images.append(image)
            targets.append(target)
        columns: dict[str, list[Any]] = {field.name: [] for field in confusions_schema()}
        for image_id, image, target, masks in self.signed(
            zip(image_ids, images, targets, self.predict(images), strict=True)
        ):
            if target is not None:
                self._count(image_id, target, masks=masks, columns=columns)
            if image_id in self._samples:
                self._write_sample(image_id, image, masks=masks, target=target)
        return self.write(unit, build_table(columns, confusions_schema()), stats=stats)

    def _count(
        self, image_id: str, target: np.ndarray, *, masks: dict[str, np.ndarray], columns: dict[str, list[Any]]
    ) -> None:
        """Add the photograph's confusion matrices to the columns, one per method."""
        small = resize_label(target, self.config.evaluate_image_size)
        for method, mask in masks.items():
            confusion = confusion_matrix(small, mask, num_classes=self._num_classes, num_concepts=self._num_concepts)
            classes, concepts = confusion.nonzero()
            columns["image_id"] += [image_id] * len(classes)
            columns["method"] += [method] * len(classes)
            columns["class_id"] += classes.tolist()
            columns["concept_id"] += concepts.tolist()
            columns["pixels"] += confusion[classes, concepts].tolist()

    def _write_sample(
        self, image_id: str, image: Image.Image, *, masks: dict[str, np.ndarray], target: np.ndarray | None
    ) -> None:
        folder = f"samples/{self._samples[image_id]}"
        scale = min(1.0, _SAMPLE_PX / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        self.run_folder.write_bytes(f"{folder}/photo.jpg", encode(image.resize(size), "JPEG", quality=88))
        self.run_folder.write_json(f"{folder}/sample.json", {"image_id": image_id})
        labelled = {name: masks[name] for name in self.shown} | ({} if target is None else {"truth": target})
        for name, mask in labelled.items():
            shown = _mask_image(mask).resize(size, Image.Resampling.NEAREST)
            self.run_folder.write_bytes(f"{folder}/{name}.png", encode(shown, "PNG"))
        for name, values in self.sample_maps(image).items():
            self.run_folder.write_bytes(f"{folder}/{name}.png", encode(_mask_image(values), "PNG"))


def _mask_image(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8 if mask.max() <= IGNORE else np.uint16))


def frame(image: Image.Image, target: np.ndarray | None, config: RunConfig) -> tuple[Image.Image, np.ndarray | None]:
    """Return the part of a photograph and its label that the protocol scores; everything after sees only that part."""
    resampling = _RESAMPLING.get(config.evaluate.protocol)
    if resampling is None:
        return image, target
    side, _ = config.evaluate_image_size
    if target is not None:
        target = np.asarray(centre_crop(Image.fromarray(target), side, Image.Resampling.NEAREST))
    return centre_crop(image, side, resampling), target


def token_batches(model: SegmentationModel, images: list[Image.Image], batch_size: int) -> Iterator[torch.Tensor]:
    """Yield the decoder's input tokens of the images, (b, hw, c), batch by batch."""
    if not images:
        return
    working = np.stack([to_working(image, model.config.image_size, model.config.resample) for image in images])
    for _, batch in batched_rows(working, batch_size):
        yield model.read_tokens(torch.from_numpy(batch).to(model.encoder.device))


def choose_samples(image_ids: list[str], count: int, seed: int) -> dict[str, str]:
    """Draw the photographs to show by the seed: image_id -> number, 00, 01, ... in order of the list."""
    chosen = np.random.default_rng(seed).permutation(len(image_ids))[:count]
    return {image_ids[i]: f"{number:02d}" for number, i in enumerate(sorted(chosen))}


def choose_extremes(image_ids: list[str], scores: np.ndarray, count: int) -> dict[str, str]:
    """Choose the photographs with the highest and the lowest scores: image_id -> best_0, ... and worst_0, ...

    No photograph is in both groups; equal scores are ranked in the order of the list.

    Args:
        image_ids: the scored photographs.
        scores: score of each photograph.
        count: largest number per group.
    """
    order = np.argsort(-scores, kind="stable")
    count = min(count, len(image_ids) // 2)
    best, worst = order[:count], order[len(order) - count :][::-1]
    return {
        image_ids[i]: f"{name}_{number}"
        for name, chosen in (("best", best), ("worst", worst))
        for number, i in enumerate(chosen)
    }


def score_photos(
    job: Job,
    images: Sequence[ImageRef],
    *,
    samples: Mapping[str, str],
    scored: bool,
    scorer: type[Scorer],
    arguments: Mapping[str, Any] | None = None,
    table: str = CONFUSIONS,
) -> TableResult:
    """Bring the table of confusions up to date; without labels only samples are made.

    Args:
        job: job on a folder that holds the model; the table and the samples are written there.
        images: photographs to score, or to choose samples from.
        samples: the photographs to show, each with its name among the samples.
        scored: whether the photographs have labels.
        scorer: class that makes the masks.
        arguments: arguments of this scorer beside those of every scorer.
        table: name of the table.
    """
    if not scored:
        images = [image for image in images if image.image_id in samples]
    given = {"num_classes": len(job.config.class_names) if scored else 0, "samples": samples}
    return build_table_of_parts(
        job,
        table,
        images=images,
        images_per_unit=_PHOTOS_PER_UNIT,
        worker=scorer,
        arguments=given | dict(arguments or {}),
    )


def read_counts(run_folder: Folder, num_classes: int, num_concepts: int) -> dict[str, csr_array]:
    """Read the confusion matrices of each method, a flat row per photograph with a labelled pixel; see `photo_counts`.

    Row i is the same photograph for all methods. Empty if no pixel is labelled.
    """
    parts: dict[str, list[csr_array]] = {}
    for name in part_files(run_folder, CONFUSIONS):
        table = read_part(run_folder, name, confusions_schema().names)
        photo = table["image_id"].combine_chunks().dictionary_encode()
        photos, method = photo.indices.to_numpy(), table["method"].to_numpy()
        class_id, concept_id, pixels = (table[name].to_numpy() for name in ("class_id", "concept_id", "pixels"))
        shape = len(photo.dictionary), num_classes, num_concepts
        for each in dict.fromkeys(method):
            rows = method == each
            counts = photo_counts(
                photos[rows], class_id[rows], concept_id=concept_id[rows], pixels=pixels[rows], shape=shape
            )
            parts.setdefault(each, []).append(counts)
    return {each: stack_counts(counts) for each, counts in parts.items()}


def read_scored_ids(run_folder: Folder) -> list[str]:
    """Read the image_id of each row of `read_counts`."""
    parts = (
        read_part(run_folder, name, ["image_id"])["image_id"].to_pylist() for name in part_files(run_folder, CONFUSIONS)
    )
    return [image_id for part in parts for image_id in dict.fromkeys(part)]
