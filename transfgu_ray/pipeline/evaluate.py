"""model + bank's method -> confusion matrices and sample masks: all stages and baselines on the same photographs."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_array

from transfgu_ray.algorithms.inference import upsample_argmax
from transfgu_ray.algorithms.intervals import photo_counts, stack_counts
from transfgu_ray.algorithms.metrics import IGNORE, confusion_matrix
from transfgu_ray.algorithms.pamr import refined_argmax
from transfgu_ray.algorithms.pseudo_labels import add_background, decode_scores, encode_scores
from transfgu_ray.config import RunConfig
from transfgu_ray.datasets import ImageRef
from transfgu_ray.images import centre_crop, resize_label, to_working
from transfgu_ray.model import load_model
from transfgu_ray.pipeline.baselines import BaselineMapper, PatchFeatures
from transfgu_ray.pipeline.build_labels import load_labeller
from transfgu_ray.pipeline.extract_features import batched_rows
from transfgu_ray.pipeline.parts import (
    PartStats,
    PartWorker,
    TableResult,
    build_table_of_parts,
    decode_labelled,
    part_files,
    read_part,
)
from transfgu_ray.pipeline.session import Resources
from transfgu_ray.pipeline.stream import Photo, Progress
from transfgu_ray.schemas import build_table, confusions_schema
from transfgu_ray.scores import REFINED, STAGE_NAMES
from transfgu_ray.storage import Folder

_TABLE = "confusions"
_PHOTOS_A_UNIT = 16
# How the published codes resize photographs before the centre crop; labels are always resized by nearest neighbour.
_RESAMPLING = {"picie": Image.Resampling.BILINEAR, "stego": Image.Resampling.NEAREST}
# Shown masks and photographs are at most this wide or high.
_SAMPLE_PX = 480


class Evaluator(PartWorker):
    """One unit of photographs -> one part of the table of confusions, and the sample masks among them."""

    def __init__(
        self,
        config: dict[str, Any],
        num_classes: int,
        samples: list[str],
        centroids: dict[str, np.ndarray],
        **part: Any,
    ) -> None:
        super().__init__(**part)
        self._config = config = RunConfig.model_validate(config)
        self._run = Folder(part["run_uri"])
        self._num_classes = num_classes
        # Nothing is scored where there are no classes.
        self._label_table = config.label_table if num_classes else None
        self._samples = {image_id: number for number, image_id in enumerate(samples)}
        self._labeller = load_labeller(self._run, config, self.device)
        model = Folder(self._run.uri_of("model"))
        self._models = [load_model(model, self.device, name) for name in ("decoder_round_0", "decoder")]
        self._centroids = centroids
        if centroids:
            self._baselines = BaselineMapper(PatchFeatures(self._run, config, self.device), centroids)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Writes the unit's samples, then its part; nothing is counted where there are no classes."""
        stats, limits = PartStats(), self._config.data
        image_ids, images, targets = [], [], []
        decoded = decode_labelled(photos, limits.min_side_px, limits.max_pixels, self._label_table, stats)
        for photo, image, target in decoded:
            image, target = self._frame(image, target)
            image_ids.append(photo.image_id)
            images.append(image)
            targets.append(target)
        columns: dict[str, list[Any]] = {field.name: [] for field in confusions_schema()}
        for image_id, image, target, masks in zip(image_ids, images, targets, self._predict(images), strict=True):
            if target is not None:
                self._count(image_id, target, masks, columns)
            if image_id in self._samples:
                self._write_sample(self._samples[image_id], image, masks, target)
        return self.write(unit, build_table(columns, confusions_schema()), stats)

    def _frame(self, image: Image.Image, target: np.ndarray | None) -> tuple[Image.Image, np.ndarray | None]:
        """What of the photograph and its label the protocol looks at; all that follows sees nothing else of them."""
        resampling = _RESAMPLING.get(self._config.evaluate.protocol)
        if resampling is None:
            return image, target
        side, _ = self._config.evaluate_image_size
        if target is not None:
            target = np.asarray(centre_crop(Image.fromarray(target), side, Image.Resampling.NEAREST))
        return centre_crop(image, side, resampling), target

    def _count(
        self, image_id: str, target: np.ndarray, masks: dict[str, np.ndarray], columns: dict[str, list[Any]]
    ) -> None:
        """Enters the photograph's confusion matrices, one a method."""
        small = resize_label(target, self._config.evaluate_image_size)
        for method, mask in masks.items():
            confusion = confusion_matrix(small, mask, self._num_classes, len(self._models[0].config.kinds))
            classes, concepts = confusion.nonzero()
            columns["image_id"] += [image_id] * len(classes)
            columns["method"] += [method] * len(classes)
            columns["class_id"] += classes.tolist()
            columns["concept_id"] += concepts.tolist()
            columns["pixels"] += confusion[classes, concepts].tolist()

    def _predict(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        """Masks of each image at the scored size: of the stages, refined, of the baselines."""
        scored = self._config.evaluate_image_size
        masks = []
        for image, maps in zip(images, self._stage_maps(images), strict=True):
            of_image = {name: upsample_argmax(m, scored) for name, m in zip(STAGE_NAMES, maps, strict=True)}
            if self._config.evaluate.refinement == "pamr":
                of_image[REFINED] = refined_argmax(
                    maps[-1], torch.from_numpy(to_working(image, scored)).to(self.device)
                )
            masks.append(of_image)
        if self._centroids and images:
            working = [to_working(image, self._config.data.image_size) for image in images]
            for of_image, maps in zip(masks, self._baselines(working), strict=True):
                of_image |= {name: upsample_argmax(m, scored) for name, m in zip(self._centroids, maps, strict=True)}
        return [{name: mask.cpu().numpy() for name, mask in of_image.items()} for of_image in masks]

    def _stage_maps(self, images: list[Image.Image]) -> list[tuple[torch.Tensor, ...]]:
        """Maps (K, h, w) of each image, one a stage."""
        config = self._config
        maps: list[list[torch.Tensor]] = [[], [], []]
        if not images:
            return []
        for _, batch in batched_rows(
            np.stack([to_working(i, config.cam_image_size) for i in images]), config.cam.batch_size
        ):
            # Through the bank's stored form, so that it is the bank that is scored.
            scores = decode_scores(*encode_scores(self._labeller(torch.from_numpy(batch).to(self.device))[0]))
            if config.has_background:
                scores = add_background(scores, config.cam.background_threshold)
            maps[0] += scores
        size = self._models[0].config.image_size
        for _, batch in batched_rows(np.stack([to_working(i, size) for i in images]), config.evaluate.batch_size):
            inputs = torch.from_numpy(batch).to(self.device)
            tokens = self._models[0].read_tokens(inputs)
            for stage, model in enumerate(self._models, start=1):
                maps[stage] += model.decode(tokens, size)
        return list(zip(*maps, strict=True))

    def _write_sample(
        self, number: int, image: Image.Image, masks: dict[str, np.ndarray], target: np.ndarray | None
    ) -> None:
        scale = min(1.0, _SAMPLE_PX / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        photo = io.BytesIO()
        image.resize(size).save(photo, "JPEG", quality=88)
        self._run.write_bytes(f"samples/{number:02d}/photo.jpg", photo.getvalue())
        labelled = {name: masks[name] for name in STAGE_NAMES} | ({} if target is None else {"truth": target})
        for name, mask in labelled.items():
            png = io.BytesIO()
            depth = np.uint8 if mask.max() <= IGNORE else np.uint16
            Image.fromarray(mask.astype(depth)).resize(size, Image.Resampling.NEAREST).save(png, "PNG")
            self._run.write_bytes(f"samples/{number:02d}/{name}.png", png.getvalue())


def choose_samples(image_ids: list[str], count: int, seed: int) -> list[str]:
    """Photographs to show, drawn by the seed, in order of name."""
    chosen = np.random.default_rng(seed).permutation(len(image_ids))[:count]
    return [image_ids[i] for i in sorted(chosen)]


def evaluate(
    run: Folder,
    config: RunConfig,
    fingerprint: str,
    root: Folder,
    images: list[ImageRef],
    scored: bool,
    centroids: dict[str, np.ndarray],
    resources: Resources,
    progress: Progress,
) -> TableResult:
    """Brings the table of confusions up to date, one part a unit; without labels it stays empty, and samples are made.

    Args:
        run: run folder with a finished model.
        config: its configuration.
        fingerprint: of what the table depends on.
        root: the dataset.
        images: photographs to score, or to look at.
        scored: whether they have labels.
        centroids: of each baseline, or its linear head.
        resources: workers and devices.
        progress: takes photographs done.
    """
    samples = choose_samples([image.image_id for image in images], config.evaluate.num_samples, config.seed)
    if not scored:
        images = [image for image in images if image.image_id in set(samples)]
    arguments = {
        "config": config.model_dump(mode="json"),
        "num_classes": len(config.class_names) if scored else 0,
        "samples": samples,
        "centroids": centroids,
    }
    return build_table_of_parts(
        run, _TABLE, fingerprint, root, images, _PHOTOS_A_UNIT, Evaluator, arguments, resources, progress
    )


def read_counts(run: Folder, num_classes: int, num_concepts: int) -> dict[str, csr_array]:
    """Confusion matrices of each method, a flat row a photograph that has a labelled pixel; see `photo_counts`.

    The rows of all methods are the same photographs. Empty where no pixel is labelled.
    """
    parts: dict[str, list[csr_array]] = {}
    for name in part_files(run, _TABLE):
        table = read_part(run, name, confusions_schema().names)
        photo = table["image_id"].combine_chunks().dictionary_encode()
        photos, method = photo.indices.to_numpy(), table["method"].to_numpy()
        class_id, concept_id, pixels = (table[name].to_numpy() for name in ("class_id", "concept_id", "pixels"))
        shape = len(photo.dictionary), num_classes, num_concepts
        for each in dict.fromkeys(method):
            rows = method == each
            counts = photo_counts(photos[rows], class_id[rows], concept_id[rows], pixels[rows], shape)
            parts.setdefault(each, []).append(counts)
    return {each: stack_counts(counts) for each, counts in parts.items()}
