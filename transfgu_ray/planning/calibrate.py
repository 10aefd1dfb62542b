"""Timing of the pieces of a run on the machines at hand: each worker times them on a few photographs."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from transfgu_ray.algorithms.concepts.kmeans import KMeans, fit_concepts
from transfgu_ray.algorithms.encoder.tokens import read_tokens
from transfgu_ray.algorithms.labels.bank import encode_scores
from transfgu_ray.algorithms.rounds.augment import Augmentation, augment
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap
from transfgu_ray.algorithms.rounds.schedule import schedule
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.parts import PartStats, decode_photos
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import Photo, UnitWorker, stream_units
from transfgu_ray.engine.trainer import new_trainer
from transfgu_ray.images import to_working
from transfgu_ray.models.weights import BACKBONE, ENCODER, load_run_backbone, load_run_encoder
from transfgu_ray.pipeline.baselines import PatchFeatures
from transfgu_ray.pipeline.concepts import concept_groups
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.pipeline.labels import load_labeller
from transfgu_ray.pipeline.train_loop import bootstrap_settings, model_config, new_student
from transfgu_ray.runs.tables import build_table, concepts_schema, to_parquet
from transfgu_ray.storage import Folder

_PHOTOS_PER_WORKER = 4
# Each piece is repeated for this long.
_SECONDS_PER_PIECE = 1.0
_KMEANS_POINTS = 4096
_KMEANS_ITERATIONS = 5


def seconds_per_item(action: Callable[[int], object], most: int) -> float:
    """Return the median seconds per item of `action(count)` at the largest count up to `most` that is not slow.

    The first call does not count, since it also loads and allocates.
    """
    count = 1
    action(count)
    while count < most:
        start = time.perf_counter()
        action(count)
        if time.perf_counter() - start > _SECONDS_PER_PIECE / 4:
            break
        count = min(2 * count, most)
    taken: list[float] = []
    while not taken or sum(taken) < _SECONDS_PER_PIECE:
        start = time.perf_counter()
        action(count)
        taken.append(time.perf_counter() - start)
    return median(taken) / count


class Calibrator(UnitWorker):
    """Times each piece of the pipeline on a few photographs, with stand-ins for concepts and decoder."""

    def __init__(self, config: RunConfig, run_uri: str, *, device: str, threads: int) -> None:
        super().__init__(device, threads)
        self._config = config
        self._run_folder = Folder(run_uri)
        self._extractor = FeatureExtractor(
            config, run_uri, table="features", fingerprint="", device=device, threads=threads
        )

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Return seconds per item, and sizes, by name, as JSON."""
        started = time.perf_counter()
        config, stats = self._config, PartStats()
        images = [image for _, image in decode_photos(photos, stats, limits=config.data)]
        if not images:
            return json.dumps({"refused": stats.refused}).encode()
        found = {"decode": self._time_decoding(photos)}
        working = np.stack([to_working(image, config.data.image_size, config.data.resample) for image in images])
        found |= self._extractor.time_pieces(working, seconds_per_item)
        found |= self._time_labels(images) | self._time_training(images[0]) | self._time_kmeans()
        found["inside"] = time.perf_counter() - started
        card = torch.cuda.get_device_name() if self.device == "cuda" else None
        return json.dumps(found | {"card": card}).encode()

    def _time_decoding(self, photos: list[Photo]) -> float:
        def decode(count: int) -> None:
            for _, image in decode_photos(photos[:count], PartStats(), limits=self._config.data):
                to_working(image, self._config.data.image_size, self._config.data.resample)

        return seconds_per_item(decode, len(photos))

    def _batch(self, images: Sequence[Any], size: tuple[int, int], most: int) -> torch.Tensor:
        working = np.stack([to_working(image, size, self._config.data.resample) for image in images])
        return torch.from_numpy(np.resize(working, (most, *working.shape[1:]))).to(self.device)

    def _time_labels(self, images: Sequence[Any]) -> dict[str, float]:
        config = self._config
        labeller = load_labeller(self._run_folder, config, self.device)
        batch = self._batch(images, config.cam_image_size, config.cam.batch_size)

        def label(count: int) -> list[torch.Tensor]:
            return [part.cpu() for part in encode_scores(labeller(batch[:count])[0])]

        stored = [part[0].numpy().tobytes() for part in label(1)]
        found = {
            "label": seconds_per_item(label, len(batch)),
            "bank_bytes": sum(len(pa.compress(part, "zstd", asbytes=True)) for part in stored),
            "baselines": 0.0,
            "views": 0.0,
        }
        if config.evaluate.baselines:
            features = PatchFeatures(self._run_folder, config, self.device)
            whole = list(self._batch(images, config.data.image_size, config.cam.batch_size).cpu().numpy())
            found["baselines"] = seconds_per_item(lambda count: list(features(whole[:count])), len(whole))
            rngs = [np.random.default_rng(0)] * len(whole)
            if features.has_views:
                found["views"] = seconds_per_item(lambda count: list(features.views(whole[:count], rngs)), len(whole))
        return found

    def _time_training(self, image: Any) -> dict[str, float]:
        config = self._config
        encoder = load_run_encoder(self._run_folder, config.encoder.precision, self.device)
        backbone = load_run_backbone(self._run_folder, config, self.device)
        train, window = config.train, config.train.token_window
        model = model_config(config, ["any"] * config.num_concepts, "")
        student = new_student(config, model, encoder)
        bootstrap = Bootstrap(student, bootstrap_settings(config))
        epochs = schedule(config.whole_rounds, train.alpha)
        grid_hw = encoder.grid_hw(config.train_crop_size)
        crops = self._batch([image], config.train_crop_size, train.batch_size)
        scores = torch.rand(len(crops), len(model.kinds), *grid_hw, device=self.device)
        kept = read_tokens(encoder, crops[:1], window=window, backbone=backbone)

        def read(count: int) -> torch.Tensor:
            return read_tokens(encoder, crops[:count], window=window, backbone=backbone)

        def step(count: int) -> None:
            bootstrap.step(kept.expand(count, -1, -1), scores[:count], epoch=epochs[-1], step=0)

        def decode(count: int) -> None:
            for maps in student.eval()(kept.expand(count, -1, -1), grid_hw)[0]:
                upsample_argmax(maps, config.evaluate_image_size)

        how, rng = Augmentation(**train.augment.model_dump()), np.random.default_rng(0)
        photo = torch.from_numpy(to_working(image, config.train_image_size, config.data.resample))
        maps = torch.rand(len(model.kinds), *encoder.grid_hw(config.cam_image_size))

        def sample(count: int) -> None:
            for _ in range(count):
                augment(photo, maps, crop_hw=config.train_crop_size, grid_hw=grid_hw, how=how, rng=rng, colour_rng=rng)

        found = {"read_tokens": seconds_per_item(read, len(crops)), "sample": seconds_per_item(sample, 8)}
        found["first_round_step"] = seconds_per_item(step, len(crops))
        found["mask"] = seconds_per_item(decode, config.evaluate.batch_size)
        if len(config.whole_rounds) > 1:
            # There is a teacher from the second round on.
            bootstrap.begin_epoch(next(epoch for epoch in epochs if epoch.starts_round), rank=0)
        return found | {"step": seconds_per_item(step, len(crops))}

    def _time_kmeans(self) -> dict[str, float]:
        """Return seconds per point, centroid, dimension and iteration."""
        width = self._extractor.embed_dim
        points = np.random.default_rng(0).standard_normal((_KMEANS_POINTS, width)).astype(np.float32)
        count = min(self._config.num_concepts, _KMEANS_POINTS)
        start = time.perf_counter()
        how = KMeans(seed=0, num_iterations=_KMEANS_ITERATIONS)
        fit_concepts(points, count, how=how, group="calibration")
        return {"kmeans": (time.perf_counter() - start) / (len(points) * count * width * _KMEANS_ITERATIONS)}


def calibrate(
    config: RunConfig,
    encoder: bytes,
    *,
    backbone: bytes | None,
    root: Folder,
    images: Sequence[ImageRef],
    resources: Resources,
) -> dict[str, Any]:
    """Return the median over the workers of the seconds of each piece; all workers time at once, as in a run.

    Args:
        config: of the run.
        encoder: result of `resolve_encoder`.
        backbone: result of `resolve_backbone`.
        root: of the dataset.
        images: of the dataset.
        resources: workers and devices.

    Returns:
        Seconds by name; "workers": how many timed; "start_stage", "start_training": seconds until workers begin;
        "card": names of the GPUs that timed, None on CPUs.
    """
    at_once = min(resources.num_workers, resources.num_cores)
    spread = np.linspace(0, len(images) - 1, at_once * _PHOTOS_PER_WORKER).astype(int).reshape(at_once, -1)
    units = {unit: [images[i] for i in dict.fromkeys(row.tolist())] for unit, row in enumerate(spread)}
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Folder(folder)
        run_folder.write_bytes(ENCODER, encoder)
        if backbone is not None:
            run_folder.write_bytes(BACKBONE, backbone)
        _write_stand_in_concepts(run_folder, config)
        start = time.perf_counter()
        arguments = {"run_uri": run_folder.uri, "config": config}
        results = list(
            stream_units(root, units, worker=Calibrator, arguments=arguments, resources=resources, progress=Progress())
        )
        wall = time.perf_counter() - start
        found = [json.loads(result.result) for result in results]
        timed = [values for values in found if "inside" in values]
        if not timed:
            return {"refused": found[0]["refused"]}
        cards = sorted({values.pop("card") for values in timed} - {None})
        pieces = {name: median(values[name] for values in timed) for name in timed[0]}
        start = time.perf_counter()
        new_trainer(
            _idle_loop,
            {},
            storage=Folder(run_folder.uri_of("train")),
            name="idle",
            resources=resources,
            runtime=config.runtime,
        ).fit()
        training = time.perf_counter() - start
    return pieces | {
        "workers": at_once,
        "start_stage": max(0.0, wall - max(values["inside"] for values in timed)),
        "start_training": training,
        "card": ", ".join(cards) or None,
    }


def _write_stand_in_concepts(run_folder: Folder, config: RunConfig) -> None:
    encoder = load_run_encoder(run_folder, config.encoder.precision, "cpu")
    kinds = [kind for kind, count in concept_groups(config).items() for _ in range(count)]
    columns = {
        "concept_id": np.arange(len(kinds), dtype=np.int32),
        "kind": kinds,
        "centroid": np.random.default_rng(0).standard_normal((len(kinds), encoder.embed_dim)).astype(np.float32),
        "num_crops": np.ones(len(kinds), dtype=np.int64),
    }
    table = build_table(columns, concepts_schema(encoder.embed_dim))
    run_folder.write_bytes("concepts.parquet", to_parquet(table, {}))


def _idle_loop(settings: dict[str, Any]) -> None:
    """Do what every training must before its first step: import its loop and find its device."""
    import ray.train
    import ray.train.torch

    import transfgu_ray.pipeline.train_loop  # noqa: F401

    ray.train.torch.get_device()
