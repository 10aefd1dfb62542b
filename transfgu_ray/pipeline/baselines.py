"""Bottom-up baselines: patches drawn from the training photographs -> clusters -> maps of other photographs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from transfgu_ray.algorithms.baselines.iic import fit_iic
from transfgu_ray.algorithms.baselines.mask_contrast import fit_masks, mask_maps, read_mask_features
from transfgu_ray.algorithms.baselines.patch_kmeans import (
    centroid_maps,
    draw_patches,
    draw_photos,
    fit_centroids,
    linear_maps,
    patch_colours,
)
from transfgu_ray.algorithms.baselines.picie import fit_picie
from transfgu_ray.algorithms.baselines.views import token_views
from transfgu_ray.algorithms.encoder.checkpoints import load_untrained
from transfgu_ray.algorithms.encoder.tokens import read_tokens, token_dim
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.build import build_table_of_parts
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import (
    PartStats,
    PartWorker,
    batched_rows,
    decode_photos,
    read_table,
)
from transfgu_ray.engine.signs import Sign, signs_of_life
from transfgu_ray.engine.stream import Photo, unwrapped_errors
from transfgu_ray.images import to_working
from transfgu_ray.models.weights import ENCODER, load_run_backbone, load_run_encoder
from transfgu_ray.pipeline.concepts import kmeans_settings
from transfgu_ray.runs.tables import baseline_schema, build_table, vectors
from transfgu_ray.storage import Folder

# Enough for every patch of a few hundred small photographs; k-means with 171 clusters then takes a minute.
MAX_POINTS = 50_000
MAX_PHOTOS = 2_000
_TABLE = "baselines"
_PHOTOS_PER_UNIT = 16
# Heads on patch tokens that are learned from two views.
OF_TWO_VIEWS = ("iic", "picie")
_VIEWS = ("view_1", "view_2")
_MAPS = {"iic": linear_maps, "picie": linear_maps, "mask_contrast": mask_maps}


def feature_of(baseline: str) -> str:
    """Return the name of the features that a baseline clusters: its own, except for heads on patch tokens."""
    return "patch_tokens" if baseline in OF_TWO_VIEWS else baseline


class PatchFeatures:
    """The patch features of a run's baselines.

    Args:
        run_folder: run folder with its encoder.
        config: the run's configuration.
        device: where to compute.
    """

    def __init__(self, run_folder: Folder, config: RunConfig, device: str) -> None:
        precision = config.encoder.precision
        self._encoder = encoder = load_run_encoder(run_folder, precision, device)
        self.grid_hw = encoder.grid_hw(config.data.image_size)
        self.device = device
        self._batch_size = config.cam.batch_size
        self._of: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        for name in map(feature_of, config.evaluate.baselines):
            if name == "patch_tokens":
                self._of[name] = encoder.patch_tokens
            elif name == "decoder_tokens":
                backbone = load_run_backbone(run_folder, config, device)
                self._of[name] = partial(read_tokens, encoder, window=config.train.token_window, backbone=backbone)
            elif name == "random_vit":
                data, source = run_folder.read_bytes(ENCODER), run_folder.uri_of(ENCODER)
                self._of[name] = load_untrained(
                    data, source, seed=config.seed, precision=precision, device=device
                ).patch_tokens
            elif name == "mask_contrast":
                prior = config.extract.foreground_prior
                self._of[name] = partial(read_mask_features, encoder, foreground_prior=prior)
            else:
                self._of[name] = partial(patch_colours, patch_size=encoder.patch_size)
        self.has_views = any(name in OF_TWO_VIEWS for name in config.evaluate.baselines)
        special = {
            "raw_colour": 3,
            "decoder_tokens": token_dim(encoder.embed_dim, config.train.token_window, config.train.backbone),
            "mask_contrast": 1 + encoder.embed_dim,
        }
        columns = [*self._of, *(_VIEWS if self.has_views else ())]
        self.widths = {name: special.get(name, encoder.embed_dim) for name in columns}

    def __call__(self, working: list[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the features (patches, width) of each photograph at its working size, row by row."""
        for _, batch in batched_rows(np.array(working), self._batch_size):
            inputs = torch.from_numpy(batch).to(self.device)
            found = {name: extract(inputs) for name, extract in self._of.items()}
            yield from ({name: values[i] for name, values in found.items()} for i in range(len(batch)))

    def views(
        self, working: list[np.ndarray], rngs: Sequence[np.random.Generator]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield two views (patches, width) of each photograph's patch tokens; empty if no baseline needs them.

        Args:
            working: photographs at their working size.
            rngs: one generator per photograph.
        """
        if not self.has_views:
            yield from ({} for _ in working)
            return
        for rows, batch in batched_rows(np.array(working), self._batch_size):
            views = token_views(self._encoder, torch.from_numpy(batch), rngs[rows])
            yield from (dict(zip(_VIEWS, pair, strict=True)) for pair in zip(*views, strict=True))


class BaselineMapper:
    """Photographs -> one map stack (K, h, w) per baseline.

    Args:
        features: features of the same run.
        centroids: centroids of each baseline, or its linear head.
    """

    def __init__(self, features: PatchFeatures, centroids: dict[str, np.ndarray]) -> None:
        self._features = features
        self._centroids = {name: torch.from_numpy(c).to(features.device) for name, c in centroids.items()}

    def __call__(self, working: list[np.ndarray]) -> Iterator[list[torch.Tensor]]:
        """Yield the maps of each photograph at its working size, in order of the centroids."""
        grid_hw = self._features.grid_hw
        for found in self._features(working):
            yield [
                _MAPS.get(name, centroid_maps)(found[feature_of(name)][None], c, grid_hw)[0]
                for name, c in self._centroids.items()
            ]


class PatchSampler(PartWorker):
    """A worker: one unit of photographs -> its rows of the table of drawn patches."""

    def __init__(self, config: RunConfig, run_uri: str, *, patches_per_photo: int, **part: Any) -> None:
        super().__init__(config, run_uri, **part)
        self._patches_per_photo = patches_per_photo
        self._features = PatchFeatures(self.run_folder, config, self.device)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Write the unit."""
        stats, data, features = PartStats(), self.config.data, self._features
        working = {
            photo.image_id: to_working(image, data.image_size, data.resample)
            for photo, image in decode_photos(self.signed(photos), stats, limits=data)
        }
        # Positions in the list, refused photographs included, so that a refusal does not change other draws.
        numbers = {photo.image_id: unit * _PHOTOS_PER_UNIT + i for i, photo in enumerate(photos)}
        image_ids: list[str] = []
        patches = [np.empty(0, dtype=np.int32)]
        columns = {name: [np.empty((0, width), dtype=np.float16)] for name, width in features.widths.items()}
        # A random stream of its own, apart from that of the drawn patches.
        rngs = [np.random.default_rng([self.config.seed, numbers[image_id], 1]) for image_id in working]
        images = list(working.values())
        for image_id, plain, views in self.signed(
            zip(working, features(images), features.views(images, rngs), strict=True)
        ):
            height, width = features.grid_hw
            drawn = draw_patches(
                height * width, self._patches_per_photo, seed=self.config.seed, photo=numbers[image_id]
            )
            image_ids += [image_id] * len(drawn)
            patches.append(drawn.astype(np.int32))
            for name, values in (plain | views).items():
                columns[name].append(values.cpu().numpy()[drawn].astype(np.float16))
        table = build_table(
            {
                "image_id": image_ids,
                "patch": np.concatenate(patches),
                **{name: np.concatenate(parts) for name, parts in columns.items()},
            },
            baseline_schema(features.widths),
        )
        return self.write(unit, table, stats=stats)


def chosen_photos(config: RunConfig, images: Sequence[ImageRef]) -> list[ImageRef]:
    """Return the training photographs whose patches are clustered; empty without baselines."""
    if not config.evaluate.baselines:
        return []
    return [images[i] for i in draw_photos(len(images), MAX_PHOTOS, config.seed)]


def fit_baselines(
    job: Job, images: Sequence[ImageRef], *, num_clusters: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Draw patches and cluster them; return the centroids of `cluster_patches` and the numbers drawn.

    At most MAX_POINTS patches of at most MAX_PHOTOS photographs, equally many per photograph, are drawn by the seed.

    Raises:
        DataError: there are fewer patches than clusters.
    """
    import ray

    config, resources = job.config, job.resources
    chosen = chosen_photos(config, images)
    result = build_table_of_parts(
        job,
        _TABLE,
        images=chosen,
        images_per_unit=_PHOTOS_PER_UNIT,
        worker=PatchSampler,
        arguments={"patches_per_photo": MAX_POINTS // len(chosen)},
    )
    # As Any: Ray's types for remote functions do not cover keyword arguments.
    function: Any = cluster_patches
    task = ray.remote(function).options(num_cpus=1, num_gpus=resources.gpus_per_worker, max_retries=1)
    with signs_of_life(lambda _: job.progress()) as sign, unwrapped_errors():
        centroids, counts = ray.get(
            task.remote(
                job.folder.uri,
                config,
                num_clusters=num_clusters,
                threads=resources.threads,
                use_gpu=resources.device == "cuda",
                sign=sign,
            )
        )
    return centroids, {"photographs": result.stats.images, "patches": result.num_rows, **counts}


def cluster_patches(
    run_uri: str, config: RunConfig, *, num_clusters: int, threads: int, use_gpu: bool, sign: Sign
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return the centroids (clusters, width) of each baseline, or its head, from the drawn patches; and mask counts.

    Raises:
        DataError: there are fewer patches or masks than clusters.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    run_folder, device = Folder(run_uri), "cuda" if use_gpu else "cpu"
    how = kmeans_settings(config, use_gpu)
    centroids: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for name in config.evaluate.baselines:
        sign()
        used = _VIEWS if name == "iic" else ("patch_tokens", *_VIEWS) if name == "picie" else (name,)
        points = [_read_features(run_folder, column) for column in used]
        if name == "iic":
            centroids[name] = fit_iic(points[0], points[1], num_clusters=num_clusters, seed=config.seed, device=device)
        elif name == "picie":
            centroids[name] = fit_picie(
                points[0], points[1], view_2=points[2], num_clusters=num_clusters, how=how, device=device
            )
        elif name == "mask_contrast":
            photos = read_table(run_folder, _TABLE, ["image_id"])["image_id"].to_numpy()
            _, photos = np.unique(photos, return_inverse=True)
            num_background = config.num_background + config.has_background
            centroids[name], masks = fit_masks(
                points[0],
                photos,
                num_foreground=num_clusters - num_background,
                num_background=num_background,
                how=how,
            )
            counts = dict(zip(("foreground_masks", "background_masks"), masks, strict=True))
        else:
            centroids[name] = fit_centroids(points[0], num_clusters, how=how, name=name)
    return centroids, counts


def _read_features(run_folder: Folder, column: str) -> np.ndarray:
    """Read one column of the table of drawn patches, float32 (patches, width)."""
    return np.ascontiguousarray(vectors(read_table(run_folder, _TABLE, [column])[column]), dtype=np.float32)
