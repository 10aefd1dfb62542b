"""Prediction of forwards, bytes and seconds of a run before it starts."""

import time
from dataclasses import dataclass
from typing import Any

from transfgu_ray.algorithms.encoder.tokens import token_dim
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.listing import list_images, open_root
from transfgu_ray.engine.session import ray_session
from transfgu_ray.errors import DataError
from transfgu_ray.models.weights import resolve_backbone, resolve_encoder
from transfgu_ray.pipeline.baselines import MAX_PHOTOS, MAX_POINTS, OF_TWO_VIEWS, feature_of
from transfgu_ray.pipeline.inputs import list_scored
from transfgu_ray.pipeline.train_loop import epoch_steps

# Bytes of a row of features without its class token (`tables.features_schema`).
_ROW_BYTES = 60


@dataclass(frozen=True)
class StagePlan:
    """The predicted cost of a stage.

    Attributes:
        stage: its name.
        forwards: number of images or crops through the encoder.
        num_bytes: bytes kept in the run folder.
        seconds: from the stage's start to its manifest.
    """

    stage: str
    forwards: int
    num_bytes: int
    seconds: float


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


def plan_stages(
    config: RunConfig, pieces: dict[str, Any], *, num_images: int, num_scored: int, embed_dim: int, cluster: Cluster
) -> list[StagePlan]:
    """Return the predicted cost of each computing stage, in order.

    Args:
        config: of the run.
        pieces: result of `planning.calibrate.calibrate`.
        num_images: number of photographs to train on.
        num_scored: number of photographs to score or show.
        embed_dim: width d of a class token.
        cluster: workers and cores.
    """
    workers, start = cluster.num_workers, pieces["start_stage"]
    crops = round(num_images * pieces["kept_windows"])
    with_foreground = config.region_mode not in ("all_foreground", "no_prior")
    per_photo = pieces["decode"] + (pieces["foreground"] if with_foreground else 0.0)
    extract = start + (num_images * per_photo + crops * (pieces["cut"] + pieces["crop"])) / workers
    passes = config.concepts.num_iterations * config.concepts.num_redos
    points = min(crops, config.concepts.max_points or crops)
    kmeans = pieces["kmeans"] * config.num_concepts * passes
    sharded = points > config.concepts.init_points
    windows = config.cam.response == "windows"
    label_forwards = num_images * (1 + (int(pieces["windows"]) if windows else 0))
    concepts = kmeans * points * embed_dim / (workers if sharded else 1)
    return [
        StagePlan("extract", crops + num_images * with_foreground, crops * (2 * embed_dim + _ROW_BYTES), extract),
        StagePlan("concepts", 0, 4 * embed_dim * config.num_concepts, concepts),
        StagePlan(
            "labels",
            label_forwards,
            round(num_images * pieces["bank_bytes"]),
            start + num_images * (pieces["decode"] + pieces["label"]) / workers,
        ),
        _plan_training(config, pieces, num_images=num_images, cluster=cluster),
        _plan_evaluation(
            config, pieces, num_images=num_images, num_scored=num_scored, embed_dim=embed_dim, cluster=cluster
        ),
    ]


def _plan_training(config: RunConfig, pieces: dict[str, Any], *, num_images: int, cluster: Cluster) -> StagePlan:
    train, ranks = config.train, cluster.train_workers
    if train.decoder_weights is not None:
        return StagePlan("train", 0, 0, 0.0)
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
    forwards = (num_images if cached else epochs * steps * per_worker * ranks) * int(pieces["token_forwards"])
    if cached:
        read = (pieces["decode"] + pieces["read_tokens"]) / cluster.num_workers
        seconds += pieces["start_stage"] + num_images * read
    return StagePlan("train", forwards, 0, seconds)


def _plan_evaluation(
    config: RunConfig, pieces: dict[str, Any], *, num_images: int, num_scored: int, embed_dim: int, cluster: Cluster
) -> StagePlan:
    workers, baselines = cluster.num_workers, len(config.evaluate.baselines)
    per_photo = pieces["decode"] + pieces["label"] + pieces["read_tokens"] + 3 * pieces["mask"]
    if baselines:
        per_photo += pieces["baselines"]
    seconds = pieces["start_stage"] + num_scored * per_photo / workers
    forwards = num_scored * (1 + int(pieces["token_forwards"]))
    if baselines:
        drawn = min(num_images, MAX_PHOTOS)
        passes = config.concepts.num_iterations * config.concepts.num_redos
        kmeans = pieces["kmeans"] * MAX_POINTS * (config.num_concepts + config.has_background) * passes * embed_dim
        of_drawn = pieces["decode"] + pieces["baselines"] + pieces["views"]
        seconds += pieces["start_stage"] + drawn * of_drawn / workers
        of_decoder = "decoder_tokens" in config.evaluate.baselines
        wider = token_dim(embed_dim, config.train.token_window, config.train.backbone) / embed_dim - 1
        # An estimate: raw colours have only three dimensions, and heads take longer than k-means.
        seconds += kmeans * (baselines + of_decoder * wider)
        features = len({feature_of(name) for name in config.evaluate.baselines})
        forwards += (drawn + num_scored) * (features + of_decoder * (int(pieces["token_forwards"]) - 1))
        forwards += drawn * (2 if any(name in OF_TWO_VIEWS for name in config.evaluate.baselines) else 0)
    return StagePlan("evaluate", forwards, 0, seconds)


def plan(config: RunConfig, address: str | None) -> dict[str, Any]:
    """Predict forwards, bytes and seconds of each stage, from a calibration on the machines of the run.

    Returns:
        "stages": fields of each `StagePlan`; "start_ray": seconds; "photographs"; "scored"; "workers";
        "train_workers"; "device"; "calibration_seconds"; "pieces": what was timed.

    Raises:
        TransfguError: settings, data or weights are unusable.
    """
    from transfgu_ray.algorithms.encoder.checkpoints import load_encoder
    from transfgu_ray.planning.calibrate import calibrate

    root = open_root(config.data.root)
    images = list_images(config.data.root, config.data.spec, split=config.data.spec.train_split).images
    scored = list_scored(config)
    num_scored = min(config.evaluate.num_samples, len(images)) if scored is None else len(scored.images)
    encoder, backbone = resolve_encoder(config), resolve_backbone(config)
    start = time.perf_counter()
    with ray_session(address, config.runtime) as resources:
        start_ray = time.perf_counter() - start
        pieces = calibrate(config, encoder, backbone=backbone, root=root, images=images, resources=resources)
    if "refused" in pieces:
        first = pieces["refused"][0]
        raise DataError(f"none of the photographs tried is usable; the first, {first['image_id']}: {first['reason']}")
    on_gpu = resources.device == "cuda"
    cluster = Cluster(resources.num_workers, resources.train_workers, resources.num_cores, shares_cores=not on_gpu)
    embed_dim = load_encoder(encoder, config.encoder.weights).embed_dim
    return {
        "stages": [
            vars(stage)
            for stage in plan_stages(
                config, pieces, num_images=len(images), num_scored=num_scored, embed_dim=embed_dim, cluster=cluster
            )
        ],
        "start_ray": start_ray,
        "photographs": len(images),
        "scored": num_scored,
        "workers": resources.num_workers,
        "train_workers": resources.train_workers,
        "device": resources.device,
        "calibration_seconds": time.perf_counter() - start,
        "pieces": pieces,
    }
