"""Prediction of forwards, operations, bytes and seconds of a run before it starts."""

import time
from dataclasses import dataclass, replace
from typing import Any

from transfgu_ray.algorithms.encoder.tokens import token_dim
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.listing import open_root
from transfgu_ray.engine.build import Layout
from transfgu_ray.engine.session import Resources, num_nodes, ray_session
from transfgu_ray.errors import DataError
from transfgu_ray.models.weights import resolve_backbone, resolve_encoder
from transfgu_ray.pipeline.baselines import MAX_PHOTOS, MAX_POINTS
from transfgu_ray.pipeline.concepts import hierarchy_settings, is_spread
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.pipeline.inputs import list_clustered, list_scored, list_training
from transfgu_ray.pipeline.labels import BankBuilder
from transfgu_ray.pipeline.train_loop import epoch_steps
from transfgu_ray.planning.operations import VitShape, least_seconds, shape_of
from transfgu_ray.planning.passes import (
    Passes,
    baseline_passes,
    by_size,
    crop_passes,
    label_passes,
    operations_of,
    token_passes,
)

# Bytes of a row of features without its class token (`tables.features_schema`).
_ROW_BYTES = 60


# Numbers of GPUs that a run is planned for.
GPUS = (1, 8)


@dataclass(frozen=True)
class StagePlan:
    """The predicted cost of a stage.

    Attributes:
        stage: its name.
        passes: images and crops through the encoder, those of one size together.
        num_bytes: bytes kept in the run folder.
        seconds: from the stage's start to its manifest.
    """

    stage: str
    passes: tuple[Passes, ...]
    num_bytes: int
    seconds: float

    @property
    def forwards(self) -> int:
        """Number of images and crops through the encoder."""
        return sum(each.count for each in self.passes)


@dataclass(frozen=True)
class Cluster:
    """The workers and cores of a run.

    Attributes:
        num_workers: actors per stage.
        train_workers: Ray Train workers.
        num_cores: cores that read and augment while the workers compute.
        shares_cores: whether the workers compute on the same cores.
    """

    num_workers: int
    train_workers: int
    num_cores: int
    shares_cores: bool


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """The numbers of photographs of a run.

    Attributes:
        clustered: whose windows are clustered.
        training: to label and to train on.
        scored: to score or show.
    """

    clustered: int
    training: int
    scored: int


def plan_stages(
    config: RunConfig, pieces: dict[str, Any], *, photographs: Photographs, shape: VitShape, cluster: Cluster
) -> list[StagePlan]:
    """Return the predicted cost of each computing stage, in order.

    Args:
        config: of the run.
        pieces: result of `planning.calibrate.calibrate`.
        photographs: how many there are.
        shape: of the encoder.
        cluster: workers and cores.
    """
    workers, start, embed_dim = cluster.num_workers, pieces["start_stage"], shape.width
    clustered, num_images = photographs.clustered, photographs.training
    crops = round(clustered * pieces["kept_windows"])
    with_foreground = config.region_mode not in ("all_foreground", "no_prior")
    per_photo = pieces["decode"] + (pieces["foreground"] if with_foreground else 0.0)
    extract = start + (clustered * per_photo + crops * (pieces["cut"] + pieces["crop"])) / workers
    points = min(crops, config.concepts.max_points or crops)
    kmeans = pieces["kmeans"] * _distances(config, points)
    concepts = kmeans * embed_dim / (workers if is_spread(config, points) else 1)
    # Contrast of the patches needs all of them.
    by_class = config.extract.foreground_prior == "attention"
    forwards = (crop_passes(config, crops), Passes(clustered * with_foreground, config.data.image_size, by_class))
    return [
        StagePlan("extract", forwards, crops * (2 * embed_dim + _ROW_BYTES), extract),
        StagePlan("concepts", (), 4 * embed_dim * config.num_concepts, concepts),
        StagePlan(
            "labels",
            label_passes(config, pieces, num_images),
            round(num_images * pieces["bank_bytes"]),
            start + num_images * (pieces["decode"] + pieces["label"]) / workers,
        ),
        _plan_training(config, pieces, num_images=num_images, shape=shape, cluster=cluster),
        _plan_evaluation(config, pieces, photographs=photographs, shape=shape, cluster=cluster),
    ]


def _distances(config: RunConfig, points: int) -> int:
    """Return how many distances of a crop, or of a centroid below, from a centroid the concepts take."""
    passes = config.concepts.num_iterations * config.concepts.num_redos
    if (hierarchy := hierarchy_settings(config)) is None:
        return config.num_concepts * passes * points
    return hierarchy.num_distances(points, config.num_concepts, passes)


def _plan_training(
    config: RunConfig, pieces: dict[str, Any], *, num_images: int, shape: VitShape, cluster: Cluster
) -> StagePlan:
    train, ranks = config.train, cluster.train_workers
    if train.decoder_weights is not None:
        return StagePlan("train", (), 0, 0.0)
    steps, per_worker = epoch_steps(config, num_images, ranks)
    epochs = sum(config.whole_rounds)
    cached = train.features == "cached"
    first = train.round_epochs[0] * pieces["first_round_step"] + (epochs - train.round_epochs[0]) * pieces["step"]
    per_image = first / epochs + (0.0 if cached else pieces["read_tokens"])
    feeding = pieces["sample"] + (0.0 if cached else pieces["decode"])
    free = cluster.num_cores - ranks if cluster.shares_cores else cluster.num_cores
    # Where the workers leave no core free for reading and augmenting, computing and feeding take turns.
    per_step_image = max(per_image, feeding * ranks / free) if free > 0 else per_image + feeding
    seconds = pieces["start_training"] + epochs * steps * per_worker * per_step_image
    count = num_images if cached else epochs * steps * per_worker * ranks
    if cached:
        read = (pieces["decode"] + pieces["read_tokens"]) / cluster.num_workers
        seconds += pieces["start_stage"] + num_images * read
    return StagePlan("train", token_passes(config, shape, count, image_hw=config.train_crop_size), 0, seconds)


def _plan_evaluation(
    config: RunConfig, pieces: dict[str, Any], *, photographs: Photographs, shape: VitShape, cluster: Cluster
) -> StagePlan:
    num_scored = photographs.scored
    workers, baselines, embed_dim = cluster.num_workers, len(config.evaluate.baselines), shape.width
    per_photo = pieces["decode"] + pieces["label"] + pieces["read_tokens"] + 3 * pieces["mask"]
    if baselines:
        per_photo += pieces["baselines"]
    seconds = pieces["start_stage"] + num_scored * per_photo / workers
    forwards = [
        *label_passes(config, pieces, num_scored),
        *token_passes(config, shape, num_scored, image_hw=config.inference_size),
    ]
    if baselines:
        drawn = min(photographs.training, MAX_PHOTOS)
        passes = config.concepts.num_iterations * config.concepts.num_redos
        kmeans = pieces["kmeans"] * MAX_POINTS * (config.num_concepts + config.has_background) * passes * embed_dim
        of_drawn = pieces["decode"] + pieces["baselines"] + pieces["views"]
        seconds += pieces["start_stage"] + drawn * of_drawn / workers
        of_decoder = "decoder_tokens" in config.evaluate.baselines
        wider = token_dim(embed_dim, config.train.token_window, config.train.backbone) / embed_dim - 1
        # An estimate: raw colours have only three dimensions, and heads take longer than k-means.
        seconds += kmeans * (baselines + of_decoder * wider)
        forwards += baseline_passes(config, shape, num_drawn=drawn, num_scored=num_scored)
    return StagePlan("evaluate", tuple(forwards), 0, seconds)


def _with_gpus(cluster: Cluster, num_gpus: int) -> Cluster:
    """Return the cluster with another number of the same GPUs, each with as many cores as it has now."""
    cores = max(1, cluster.num_cores * num_gpus // cluster.num_workers)
    return replace(cluster, num_workers=num_gpus, train_workers=num_gpus, num_cores=cores)


def predict(
    config: RunConfig,
    pieces: dict[str, Any],
    *,
    photographs: Photographs,
    shape: VitShape,
    resources: Resources,
    start_ray: float,
    gpu_tflops: float | None,
) -> dict[str, Any]:
    """Return the entries of `plan` that follow from a calibration: all but "photographs" and what comes after it.

    Args:
        config: of the run.
        pieces: result of `planning.calibrate.calibrate`.
        photographs: how many there are.
        shape: of the encoder.
        resources: workers and devices of the calibration.
        start_ray: seconds that Ray took to start.
        gpu_tflops: see `plan`.
    """
    card = pieces["card"]
    here = Cluster(resources.num_workers, resources.train_workers, resources.num_cores, shares_cores=card is None)

    def stages_on(cluster: Cluster) -> list[StagePlan]:
        return plan_stages(config, pieces, photographs=photographs, shape=shape, cluster=cluster)

    stages = stages_on(here)
    operations = [operations_of(stage.passes, shape) for stage in stages]
    on_gpus: dict[int, list[float]] = {}
    if card is not None:
        on_gpus = {n: [stage.seconds for stage in stages_on(_with_gpus(here, n))] for n in GPUS}
    elif gpu_tflops is not None:
        on_gpus = {n: [least_seconds(count, tflops=gpu_tflops, num_gpus=n) for count in operations] for n in GPUS}
    # A lower bound has no start in it.
    begin = 0.0 if card is None else start_ray
    return {
        "stages": [
            {
                "stage": stage.stage,
                "forwards": stage.forwards,
                "operations": operations[i],
                "num_bytes": stage.num_bytes,
                "seconds": stage.seconds,
                "gpu_seconds": {n: seconds[i] for n, seconds in on_gpus.items()},
            }
            for i, stage in enumerate(stages)
        ],
        "all": {
            "forwards": sum(stage.forwards for stage in stages),
            "operations": sum(operations),
            "num_bytes": sum(stage.num_bytes for stage in stages),
            "seconds": start_ray + sum(stage.seconds for stage in stages),
            "gpu_seconds": {n: begin + sum(seconds) for n, seconds in on_gpus.items()},
        },
        "passes": by_size([each for stage in stages for each in stage.passes], shape),
        "start_ray": start_ray,
        "workers": resources.num_workers,
        "train_workers": resources.train_workers,
        "device": resources.device,
        "card": card,
        "gpu_tflops": gpu_tflops if card is None else None,
    }


def num_files(config: RunConfig, *, clustered: int, training: int) -> int:
    """Return the files of the features and the bank, the largest tables that a run keeps."""
    tables = ((clustered, FeatureExtractor), (training, BankBuilder))
    layouts = [
        Layout.of(count, config.extract.images_per_part, table.photograph_bytes(config)) for count, table in tables
    ]
    # Each has an index.
    return sum(layout.num_parts + 1 for layout in layouts)


def plan(
    config: RunConfig, address: str | None, gpu_tflops: float | None = None, node_price: float | None = None
) -> dict[str, Any]:
    """Predict forwards, operations, bytes and seconds of each stage, from a calibration on the machines of the run.

    Args:
        config: of the run.
        address: Ray to use; None = start a local one.
        gpu_tflops: sustained speed of a GPU, 1e12 operations a second, above 0; not used where the calibration ran on
            GPUs.
        node_price: dollars of an hour of one node, at least 0.

    Returns:
        "stages": of each its "stage", "forwards" and "operations" (floating-point) of the encoder, "num_bytes",
        "seconds" here, and "gpu_seconds" by number of GPUs: predicted from a calibration on GPUs, else a lower bound
        from the operations and `gpu_tflops`, else empty; "all": the same summed, with the start of Ray in what was
        timed; "passes": see `by_size`; "start_ray": seconds; "workers"; "train_workers"; "device"; "card": names of
        the GPUs that were timed, or None; "gpu_tflops": as used; "photographs"; "scored"; "calibration_seconds";
        "pieces": what was timed; "nodes"; "files": of the features and the bank; "dollars": of the time here on all
        nodes, or None.

    Raises:
        TransfguError: settings, data or weights are unusable.
    """
    from transfgu_ray.algorithms.encoder.checkpoints import load_encoder
    from transfgu_ray.planning.calibrate import calibrate

    root = open_root(config.data.root)
    images, clustered = list_training(config).images, list_clustered(config)
    scored = list_scored(config)
    num_scored = min(config.evaluate.num_samples, len(images)) if scored is None else len(scored.images)
    encoder, backbone = resolve_encoder(config), resolve_backbone(config)
    start = time.perf_counter()
    with ray_session(address, config.runtime) as resources:
        start_ray = time.perf_counter() - start
        nodes = num_nodes()
        pieces = calibrate(config, encoder, backbone=backbone, root=root, images=images, resources=resources)
    if "refused" in pieces:
        first = pieces["refused"][0]
        raise DataError(f"none of the photographs tried is usable; the first, {first['image_id']}: {first['reason']}")
    num_clustered = len(images if clustered is None else clustered.images)
    predicted = predict(
        config,
        pieces,
        photographs=Photographs(clustered=num_clustered, training=len(images), scored=num_scored),
        shape=shape_of(load_encoder(encoder, config.encoder.weights)),
        resources=resources,
        start_ray=start_ray,
        gpu_tflops=gpu_tflops,
    )
    return predicted | {
        "photographs": len(images),
        "scored": num_scored,
        "calibration_seconds": time.perf_counter() - start,
        "pieces": pieces,
        "nodes": nodes,
        "files": num_files(config, clustered=num_clustered, training=len(images)),
        "dollars": None if node_price is None else node_price * nodes * predicted["all"]["seconds"] / 3600,
    }
