"""The whole pipeline: memory for many photographs, the overhead of Ray, one worker against two."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32

from transfgu_ray.algorithms.concepts.hierarchical_kmeans import Hierarchy, fit_hierarchy
from transfgu_ray.algorithms.concepts.kmeans import KMeans, fit_concepts
from transfgu_ray.bench.subject import jpeg_photographs
from transfgu_ray.bench.timing import Measurements, Target, ratio, take_turns
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.cores import usable_cores
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources, ray_session
from transfgu_ray.engine.stream import Photo, split_units, stream_units
from transfgu_ray.models.weights import ENCODER, resolve_encoder
from transfgu_ray.pipeline.concepts import cluster
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.runs.index import part_name
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.runs.tables import build_table, features_schema, to_parquet
from transfgu_ray.storage import Folder

_SIZES = (1_000, 10_000)
# A tiny encoder on small photographs, since only growth with their number matters.
_SMALL = (
    "encoder.overrides={embed_dim: 48, depth: 2, num_heads: 3, patch_size: 8}",
    "data.image_size=[64, 64]",
    "extract.window_fracs=[0.5]",
    "concepts.num_concepts=4",
    "cam.batch_size=16",
    "train.batch_size=64",
    "train.round_epochs=[1]",
    "evaluate.num_samples=2",
)
_STAGES = STAGES.lasting[: STAGES.lasting.index("evaluate")]
_UNITS = 24
# Of ViT-S/8.
_WIDTH = 384
_ROUNDS = 3


def measure_memory(device: str) -> Measurements:
    """Measure peak memory of all stages and of the object store with 10,000 photographs relative to 1,000."""
    peaks: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in _SIZES:
            _write_photographs(Path(folder) / f"photos-{size}", size)
            peaks[size] = _run_and_watch(Path(folder), size, device)
    few, many = (peaks[size] for size in _SIZES)
    name = f"peak memory, {_SIZES[1]:,} / {_SIZES[0]:,} photographs"
    return Measurements(
        targets=[Target(f"{name}, {what}", "<=", 1.1, many[what] / few[what]) for what in few],
        details={"peak_mb": {str(size): peak for size, peak in peaks.items()}},
    )


def _write_photographs(folder: Path, count: int) -> None:
    folder.mkdir()
    encoded = jpeg_photographs(50, size=(96, 72))
    for i in range(count):
        (folder / f"{i:06d}.jpg").write_bytes(encoded[i % len(encoded)])


def _run_and_watch(folder: Path, size: int, device: str) -> dict[str, int]:
    """Run each stage in a new process; return peak MB of each (driver and workers) and of the object store."""
    run, known, store = folder / f"run-{size}", set(_raylets()), 0
    settings = [word for text in (*_SMALL, f"runtime.device={device}") for word in ("--set", text)]
    for stage in _STAGES:
        command = [sys.executable, "-m", "transfgu_ray.cli", stage, str(run), "--quiet"]
        if stage == _STAGES[0]:
            command += ["--preset", "tiny_cpu", "--data", str(folder / f"photos-{size}"), *settings]
        with subprocess.Popen(command) as process:  # nosec B603  # words of our own
            while process.poll() is None:
                store = max([store, *(_store_mb(raylet) for raylet in set(_raylets()) - known)])
                time.sleep(0.2)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    manifests = {stage: json.loads((run / f"{stage}.json").read_text()) for stage in _STAGES}
    return {stage: manifest["peak_memory_mb"] for stage, manifest in manifests.items()} | {
        "object store": max(1, store)
    }


def _raylets() -> list[str]:
    names = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "comm").read_text().strip() == "raylet":
                names.append(entry.name)
        except OSError:
            continue
    return names


def _store_mb(raylet: str) -> int:
    """Return the MB of the object store ever used; its file is deleted, but the raylet holds it open."""
    largest = 0
    for descriptor in Path(f"/proc/{raylet}/fd").glob("*"):
        try:
            if "plasma" in os.readlink(descriptor):
                largest = max(largest, os.stat(descriptor).st_blocks * 512)
        except OSError:
            continue
    return largest // 2**20


def measure_ray(device: str) -> Measurements:
    """Measure extract under Ray relative to a plain loop over the same units, and two workers relative to one."""
    config = build_config(get_preset("tiny_cpu"), None, ["extract.window_fracs=[0.5, 0.4, 0.3]"])
    loop: list[float] = []
    one: list[float] = []
    two: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        photos, run_folder = Path(folder) / "photos", Folder(f"{folder}/run")
        _write_photographs(photos, _UNITS * config.extract.images_per_part)
        run_folder.write_bytes(ENCODER, resolve_encoder(config))
        names = sorted(path.name for path in photos.iterdir())
        units = split_units([ImageRef(name, None, -1) for name in names], config.extract.images_per_part)
        with ray_session(None, RuntimeConfig.model_validate({"device": device})) as resources:
            parts = []
            for _ in range(_ROUNDS):
                loop.append(_plain_loop(run_folder, photos, config=config, units=units, resources=resources))
                for workers, seconds in ((1, one), (2, two)):
                    seconds.append(
                        _under_ray(
                            run_folder,
                            photos,
                            config=config,
                            units=units,
                            resources=replace(resources, num_workers=workers),
                        )
                    )
                    parts.append([run_folder.read_bytes(part_name("features", unit)) for unit in range(len(units))])
    return Measurements(
        targets=[
            Target("Ray: pipeline / plain loop", "<=", 1.10, median(a / b for a, b in zip(one, loop, strict=True))),
            Target("Ray: two workers / one", ">=", 1.7, median(a / b for a, b in zip(one, two, strict=True))),
            Target("Ray: parts that differ between one worker and two", "<=", 0, _differing(parts)),
        ],
        details={
            "seconds_a_unit": {"plain loop": median(loop), "one worker": median(one), "two workers": median(two)},
            "units": f"{len(units)} of {config.extract.images_per_part} photographs, tiny_cpu",
            "cores": usable_cores(),
        },
    )


def measure_concepts(device: str) -> Measurements:
    """Measure the peak memory of workers that cluster more class tokens than one of them may hold."""
    rows, parts = 5_000_000, 500
    config = build_config(get_preset("paper"), None, ["data.region_mode=no_prior", "concepts.num_iterations=3"])
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Folder(folder)
        for part in range(parts):
            run_folder.write_bytes(part_name("features", part), _features_part(part, rows // parts))
        start = time.perf_counter()
        with ray_session(None, RuntimeConfig.model_validate({"device": device})) as resources:
            job = Job(folder=run_folder, config=config, root=run_folder, resources=resources, fingerprint="")
            groups, peak_mb = cluster(job, rows)
    return Measurements(
        targets=[Target(f"concepts: GB a worker, {rows:,} x {_WIDTH}", "<=", 2.0, peak_mb / 1024)],
        details={
            "workers": resources.num_workers,
            "seconds": time.perf_counter() - start,
            "passes": groups["any"]["passes"],
            "tokens_gb": rows * _WIDTH * 2 / 2**30,
        },
    )


def measure_hierarchy(device: str) -> Measurements:
    """Measure hierarchical k-means relative to flat on the same class tokens in memory.

    The target is the ratio of the distances that both compute, were they of equal speed.
    """
    rows, concepts = 20_000, 27
    points = _tokens(0, rows)
    how = KMeans(seed=0, num_iterations=10)
    # The defaults of `concepts.num_resamples` and `concepts.init_points`.
    hierarchy = Hierarchy(10, 262_144)
    faiss.omp_set_num_threads(torch.get_num_threads())
    seconds = take_turns(
        {
            "flat": lambda: fit_concepts(points, concepts, how=how, group="any"),
            "hierarchical": lambda: fit_hierarchy(points, concepts, how=how, hierarchy=hierarchy, group="any"),
        },
        _ROUNDS,
    )
    more = hierarchy.num_distances(rows, concepts, how.num_iterations) / (rows * concepts * how.num_iterations)
    found = ratio(seconds, "hierarchical", "flat")
    return Measurements(
        targets=[Target(f"concepts: hierarchical / flat, {rows:,} x {_WIDTH}", "<=", round(more, 1), found)],
        details={
            "seconds": {name: median(each) for name, each in seconds.items()},
            "clusters": hierarchy.level_sizes(rows, concepts),
            "iterations": how.num_iterations,
        },
    )


def _tokens(seed: int, rows: int) -> Float32[np.ndarray, "rows 384"]:
    """Draw class tokens of width 384 around 64 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((64, _WIDTH), dtype=np.float32)
    return centres[rng.integers(64, size=rows)] + rng.standard_normal((rows, _WIDTH), dtype=np.float32)


def _features_part(number: int, rows: int) -> pa.Buffer:
    """Build a part of the features table."""
    columns = {
        "image_id": [f"{number:04d}.jpg"] * rows,
        "crop_id": np.arange(rows, dtype=np.int32),
        "box_xyxy": np.zeros((rows, 4), dtype=np.int32),
        "window_frac": np.full(rows, 0.5, dtype=np.float32),
        "kind": ["any"] * rows,
        "foreground_frac": np.ones(rows, dtype=np.float32),
        "cls_token": _tokens(number, rows).astype(np.float16),
    }
    return to_parquet(build_table(columns, features_schema(_WIDTH)), {})


def _arguments(run_folder: Folder, config: RunConfig) -> dict[str, Any]:
    return {"config": config, "run_uri": run_folder.uri, "table": "features", "fingerprint": ""}


def _plain_loop(
    run_folder: Folder, photos: Path, *, config: RunConfig, units: Sequence[Sequence[ImageRef]], resources: Resources
) -> float:
    """Return seconds per unit, reading included."""
    extractor = FeatureExtractor(**_arguments(run_folder, config), device=resources.device, threads=resources.threads)
    start = time.perf_counter()
    for unit, refs in enumerate(units):
        read = [Photo(ref.image_id, (photos / ref.image_id).read_bytes(), None, None) for ref in refs]
        extractor.process(unit, read)
    return (time.perf_counter() - start) / len(units)


def _under_ray(
    run_folder: Folder, photos: Path, *, config: RunConfig, units: Sequence[Sequence[ImageRef]], resources: Resources
) -> float:
    """Return seconds per unit from the first finished one to the last, so that starting processes does not count."""
    numbered = dict(enumerate(units))
    times = [
        time.perf_counter()
        for _ in stream_units(
            Folder(str(photos)),
            numbered,
            worker=FeatureExtractor,
            arguments=_arguments(run_folder, config),
            resources=resources,
            progress=Progress(),
        )
    ]
    # The first unit of each worker ends near the start of the clock.
    return (times[-1] - times[0]) / (len(times) - resources.num_workers)


def _differing(rounds: list[list[bytes]]) -> int:
    return sum(len(set(versions)) > 1 for versions in zip(*rounds, strict=True))
