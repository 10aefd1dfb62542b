"""Bottom-up baselines: patches drawn from the training photographs -> centroids -> maps of other photographs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from transfgu_ray.algorithms.baselines import (
    centroid_maps,
    draw_patches,
    draw_photos,
    fit_centroids,
    patch_colours,
)
from transfgu_ray.algorithms.tokens import read_tokens, token_dim
from transfgu_ray.algorithms.weights import load_untrained
from transfgu_ray.backbone import load_run_backbone
from transfgu_ray.config import RunConfig
from transfgu_ray.datasets import ImageRef
from transfgu_ray.images import to_working
from transfgu_ray.pipeline.extract_features import batched_rows
from transfgu_ray.pipeline.parts import (
    PartStats,
    PartWorker,
    TableResult,
    build_table_of_parts,
    decode_photos,
    read_table,
)
from transfgu_ray.pipeline.session import Resources
from transfgu_ray.pipeline.stream import Photo, Progress, unwrapped_errors
from transfgu_ray.prior import ENCODER, load_run_encoder
from transfgu_ray.schemas import baseline_schema, build_table
from transfgu_ray.storage import Folder

# Enough for every patch of a few hundred small photographs, and for k-means of 171 clusters in a minute.
MAX_POINTS = 50_000
MAX_PHOTOS = 2_000
_TABLE = "baselines"
_PHOTOS_A_UNIT = 16


class PatchFeatures:
    """What each baseline of a run knows about a patch.

    Args:
        run: run folder with its encoder.
        config: the run's configuration.
        device: where to compute.
    """

    def __init__(self, run: Folder, config: RunConfig, device: str) -> None:
        precision = config.encoder.precision
        encoder = load_run_encoder(run, precision, device)
        self.grid_hw = encoder.grid_hw(config.data.image_size)
        self.device = device
        self._batch_size = config.cam.batch_size
        self._of: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        for name in config.evaluate.baselines:
            if name == "patch_tokens":
                self._of[name] = encoder.patch_tokens
            elif name == "decoder_tokens":
                backbone = load_run_backbone(run, config, device)
                self._of[name] = partial(read_tokens, encoder, window=config.train.token_window, backbone=backbone)
            elif name == "random_vit":
                data, source = run.read_bytes(ENCODER), run.uri_of(ENCODER)
                self._of[name] = load_untrained(data, source, config.seed, precision, device).patch_tokens
            else:
                self._of[name] = partial(patch_colours, patch_size=encoder.patch_size)
        of_decoder = token_dim(encoder.embed_dim, config.train.token_window, config.train.backbone)
        special = {"raw_colour": 3, "decoder_tokens": of_decoder}
        self.widths = {name: special.get(name, encoder.embed_dim) for name in self._of}

    def __call__(self, working: list[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """Features (patches, width) of each photograph at its working size, row by row."""
        for _, batch in batched_rows(np.array(working), self._batch_size):
            inputs = torch.from_numpy(batch).to(self.device)
            found = {name: extract(inputs) for name, extract in self._of.items()}
            yield from ({name: values[i] for name, values in found.items()} for i in range(len(batch)))


class BaselineMapper:
    """Photographs -> one map stack (K, h, w) a baseline.

    Args:
        features: of the same run.
        centroids: of each baseline.
    """

    def __init__(self, features: PatchFeatures, centroids: dict[str, np.ndarray]) -> None:
        self._features = features
        self._centroids = {name: torch.from_numpy(c).to(features.device) for name, c in centroids.items()}

    def __call__(self, working: list[np.ndarray]) -> Iterator[list[torch.Tensor]]:
        """The maps of each photograph at its working size, in order of the centroids."""
        grid_hw = self._features.grid_hw
        for found in self._features(working):
            yield [centroid_maps(found[name][None], c, grid_hw)[0] for name, c in self._centroids.items()]


class PatchSampler(PartWorker):
    """One unit of photographs -> one part of the table of drawn patches."""

    def __init__(self, config: dict[str, Any], patches_a_photo: int, **part: Any) -> None:
        super().__init__(**part)
        self._config = RunConfig.model_validate(config)
        self._patches_a_photo = patches_a_photo
        self._features = PatchFeatures(Folder(part["run_uri"]), self._config, self.device)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Writes the unit's part."""
        stats, data, features = PartStats(), self._config.data, self._features
        working = {
            photo.image_id: to_working(image, data.image_size)
            for photo, image in decode_photos(photos, data.min_side_px, data.max_pixels, stats)
        }
        # The place in the list, which a refused photograph keeps too.
        numbers = {photo.image_id: unit * _PHOTOS_A_UNIT + i for i, photo in enumerate(photos)}
        image_ids: list[str] = []
        patches = [np.empty(0, dtype=np.int32)]
        columns = {name: [np.empty((0, width), dtype=np.float16)] for name, width in features.widths.items()}
        for image_id, found in zip(working, features(list(working.values())), strict=True):
            height, width = features.grid_hw
            drawn = draw_patches(height * width, self._patches_a_photo, self._config.seed, numbers[image_id])
            image_ids += [image_id] * len(drawn)
            patches.append(drawn.astype(np.int32))
            for name, values in found.items():
                columns[name].append(values.cpu().numpy()[drawn].astype(np.float16))
        table = build_table(
            {
                "image_id": image_ids,
                "patch": np.concatenate(patches),
                **{name: np.concatenate(parts) for name, parts in columns.items()},
            },
            baseline_schema(features.widths),
        )
        return self.write(unit, table, stats)


def chosen_photos(config: RunConfig, images: Sequence[ImageRef]) -> list[ImageRef]:
    """The training photographs whose patches are clustered; none where no baseline is asked for."""
    if not config.evaluate.baselines:
        return []
    return [images[i] for i in draw_photos(len(images), MAX_PHOTOS, config.seed)]


def fit_baselines(
    run: Folder,
    config: RunConfig,
    fingerprint: str,
    root: Folder,
    images: Sequence[ImageRef],
    num_clusters: int,
    resources: Resources,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], TableResult]:
    """Centroids (clusters, width) of each baseline, and what became of the photographs.

    At most MAX_POINTS patches of at most MAX_PHOTOS photographs, as many of each photograph, drawn by the seed.

    Raises:
        DataError: fewer patches than clusters.
    """
    import ray

    chosen = chosen_photos(config, images)
    arguments = {"config": config.model_dump(mode="json"), "patches_a_photo": MAX_POINTS // len(chosen)}
    result = build_table_of_parts(
        run, _TABLE, fingerprint, root, chosen, _PHOTOS_A_UNIT, PatchSampler, arguments, resources, progress
    )
    task = ray.remote(cluster_patches).options(num_cpus=1, num_gpus=resources.gpus_per_worker, max_retries=1)
    with unwrapped_errors():
        centroids = ray.get(task.remote(run.uri, config, num_clusters, resources.threads, resources.device == "cuda"))
    return centroids, result


def cluster_patches(
    run_uri: str, config: RunConfig, num_clusters: int, threads: int, use_gpu: bool
) -> dict[str, np.ndarray]:
    """Centroids of each baseline from the table of drawn patches.

    Raises:
        DataError: fewer patches than clusters.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    centroids = {}
    for name in config.evaluate.baselines:
        column = read_table(Folder(run_uri), _TABLE, [name])[name].combine_chunks()
        points = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        centroids[name] = fit_centroids(
            np.ascontiguousarray(points, dtype=np.float32),
            num_clusters,
            config.seed,
            config.concepts.num_iterations,
            config.concepts.num_redos,
            use_gpu,
            name,
        )
    return centroids
