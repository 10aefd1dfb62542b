"""model + bank's method -> confusion matrices and sample masks: all stages and baselines on the same photographs."""

import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image

from transfgu_ray.algorithms.inference import upsample_argmax
from transfgu_ray.algorithms.metrics import IGNORE, add_confusions, confusion_matrix
from transfgu_ray.algorithms.pseudo_labels import add_background, decode_scores, encode_scores
from transfgu_ray.config import RunConfig
from transfgu_ray.datasets import ImageRef
from transfgu_ray.images import ImageRefused, decode_label, resize_label, to_working
from transfgu_ray.model import load_model
from transfgu_ray.pipeline.baselines import BaselineMapper, PatchFeatures
from transfgu_ray.pipeline.build_labels import load_labeller
from transfgu_ray.pipeline.extract_features import batched_rows
from transfgu_ray.pipeline.parts import PartStats, decode_photos
from transfgu_ray.pipeline.session import Resources
from transfgu_ray.pipeline.stream import Photo, Progress, UnitWorker, split_units, stream_units
from transfgu_ray.scores import STAGE_NAMES
from transfgu_ray.storage import Folder

_IMAGES_A_UNIT = 16
# Shown masks and photographs are at most this wide or high.
_SAMPLE_PX = 480


class Evaluator(UnitWorker):
    """One unit of photographs -> a confusion matrix a stage and a baseline, and the sample masks among them."""

    def __init__(
        self,
        run_uri: str,
        config: dict[str, Any],
        num_classes: int,
        samples: list[str],
        centroids: dict[str, np.ndarray],
        device: str,
        threads: int,
    ) -> None:
        super().__init__(device, threads)
        self._config = config = RunConfig.model_validate(config)
        self._run = Folder(run_uri)
        self._num_classes = num_classes
        self._samples = {image_id: number for number, image_id in enumerate(samples)}
        self._labeller = load_labeller(self._run, config, device)
        model = Folder(self._run.uri_of("model"))
        self._models = [load_model(model, device, name) for name in ("decoder_round_0", "decoder")]
        self._baselines = BaselineMapper(PatchFeatures(self._run, config, device), centroids) if centroids else None
        self._num_matrices = len(STAGE_NAMES) + len(centroids)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Confusion matrices (stages and baselines, classes, concepts) as .npy bytes, after a JSON line of refusals."""
        stats = PartStats()
        limits = self._config.data
        decoded, targets = [], []
        for photo, image in decode_photos(photos, limits.min_side_px, limits.max_pixels, stats):
            try:
                targets.append(self._read_target(photo))
                decoded.append((photo, image))
            except ImageRefused as refusal:
                stats.refused.append({"image_id": photo.image_id, "reason": str(refusal)})
        total = np.zeros((self._num_matrices, self._num_classes, len(self._models[0].config.kinds)), dtype=np.int64)
        predictions = self._predict([image for _, image in decoded])
        for (photo, image), target, masks in zip(decoded, targets, predictions, strict=True):
            if target is not None:
                small = resize_label(target, self._config.evaluate_image_size)
                for matrix, mask in zip(total, masks, strict=True):
                    matrix += confusion_matrix(small, mask, *matrix.shape)
            if photo.image_id in self._samples:
                self._write_sample(self._samples[photo.image_id], image, masks[: len(STAGE_NAMES)], target)
        stats.images = len(decoded)
        buffer = io.BytesIO()
        np.save(buffer, total, allow_pickle=False)
        return json.dumps(vars(stats)).encode() + b"\n" + buffer.getvalue()

    def _read_target(self, photo: Photo) -> np.ndarray | None:
        """Label ids; None where nothing is scored."""
        if not self._num_classes:
            return None
        if photo.label is None:
            raise ImageRefused("its label cannot be read")
        target = decode_label(photo.label)
        unknown = np.setdiff1d(target, [*range(self._num_classes), IGNORE])
        if len(unknown):
            raise ImageRefused(
                f"its label holds the unknown id {unknown[0]}; known are 0 to {self._num_classes - 1}, 255"
            )
        return target

    def _predict(self, images: list[Image.Image]) -> list[list[np.ndarray]]:
        """Masks of each image at the scored size, one a stage, then one a baseline."""
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
        scored = config.evaluate_image_size
        masks = [[upsample_argmax(m, scored).cpu().numpy() for m in stages] for stages in zip(*maps, strict=True)]
        if self._baselines is not None:
            working = [to_working(i, config.data.image_size) for i in images]
            for of_image, of_baselines in zip(masks, self._baselines(working), strict=True):
                of_image += [upsample_argmax(m, scored).cpu().numpy() for m in of_baselines]
        return masks

    def _write_sample(
        self, number: int, image: Image.Image, masks: list[np.ndarray], target: np.ndarray | None
    ) -> None:
        scale = min(1.0, _SAMPLE_PX / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        photo = io.BytesIO()
        image.resize(size).save(photo, "JPEG", quality=88)
        self._run.write_bytes(f"samples/{number:02d}/photo.jpg", photo.getvalue())
        labelled = dict(zip(STAGE_NAMES, masks, strict=True)) | ({} if target is None else {"truth": target})
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
    root: Folder,
    images: list[ImageRef],
    scored: bool,
    centroids: dict[str, np.ndarray],
    resources: Resources,
    progress: Progress,
) -> tuple[PartStats, dict[str, np.ndarray] | None, int]:
    """Confusion matrix of each stage and baseline (None without labels), refusals, and the workers' peak memory in MB.

    Args:
        run: run folder with a finished model.
        config: its configuration.
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
        "run_uri": run.uri,
        "config": config.model_dump(mode="json"),
        "num_classes": len(config.class_names) if scored else 0,
        "samples": samples,
        "centroids": centroids,
    }
    units = dict(enumerate(split_units(images, _IMAGES_A_UNIT)))
    stats, total, peak_mb = PartStats(), None, 0
    for result in stream_units(root, units, Evaluator, arguments, resources):
        head, _, matrices = result.result.partition(b"\n")
        stats.add(PartStats(**json.loads(head)))
        total = add_confusions(total, np.load(io.BytesIO(matrices), allow_pickle=False))
        peak_mb = max(peak_mb, result.peak_mb)
        progress(len(units[result.unit]))
    stats.refused.sort(key=lambda refusal: refusal["image_id"])
    if not scored or total is None or not total.sum():
        return stats, None, peak_mb
    return stats, dict(zip((*STAGE_NAMES, *centroids), total, strict=True)), peak_mb
