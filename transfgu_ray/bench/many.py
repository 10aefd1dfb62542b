"""A million photographs: what a finished or half finished table of them costs, on a disk and on a late object store.

No encoder runs and no photograph is read: the tables are as large in number, with rows of a few bytes.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from transfgu_ray.bench.slow_store import slow_store
from transfgu_ray.bench.timing import Measurements, Target
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine import build
from transfgu_ray.engine.build import Layout, build_table_of_parts
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import PartWorker, read_row, unit_name
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.pipeline.features import FeatureExtractor
from transfgu_ray.pipeline.inputs import list_training, stage_inputs
from transfgu_ray.pipeline.labels import BankBuilder
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.index import IndexWriter, describe_part, part_metadata, part_name, read_index
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder

# ImageNet's training photographs, in units of 16; each answer of the store is late by 25 ms.
_PHOTOGRAPHS = 1_200_000
_LATENCY_S = 0.025
# Rows written of each part of the bank, and drawn from the first eight parts.
_ROWS_A_PART, _ROWS_DRAWN = 40, 300
_ALONE = Resources(num_cores=1, num_workers=1, train_workers=1, device="cpu", threads=1, num_blocks=None)


class _Names(Sequence[ImageRef]):
    """Photographs that take no memory."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: Any) -> Any:
        return ImageRef(f"{range(self._count)[at]:08d}.jpg", None, 0)


class _Features(PartWorker):
    """Makes nothing: everything is there."""

    photograph_bytes = staticmethod(FeatureExtractor.photograph_bytes)


class _Bank(_Features):
    rows_apart = True
    photograph_bytes = staticmethod(BankBuilder.photograph_bytes)


_TABLES = {"features": _Features, "labels": _Bank}


def measure(device: str) -> Measurements:
    """Measure resuming, requests, files, and a call of a finished run."""
    config, measured = get_preset("paper"), Measurements()
    layouts = {name: Layout.of(_PHOTOGRAPHS, 16, of.photograph_bytes(config)) for name, of in _TABLES.items()}
    files = sum(layout.num_parts + 1 for layout in layouts.values())
    what = f"{_PHOTOGRAPHS:,} photographs"
    measured.targets.append(Target(f"files, {what}, features + bank", "<=", 5_000, files))
    try:
        with slow_store(_LATENCY_S) as count:
            found = _on_store(config, layouts, count)
    except ImportError:
        # The extra `test` is not installed.
        found = {}
    late = f"s3 at {_LATENCY_S * 1e3:.0f} ms"
    measured.targets += [
        Target(f"resume check of {layouts['labels'].num_units:,} finished units, {late}, s", "<=", 30, found.get("s")),
        Target(f"requests of a unit, {late}", "<=", 2, found.get("unit")),
        Target(f"requests of a training sample, {late}", "<=", 1.1, found.get("sample")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        finished = _finished_run(Path(folder), _PHOTOGRAPHS)
        seconds, peak_mb = _call(finished)
    measured.targets.append(Target(f"call of a finished run, {what} on disk, s", "<=", 60, seconds))
    measured.details = {"on the store": found, "call of a finished run": {"seconds": seconds, "peak_mb": peak_mb}}
    return measured


def _write_finished(folder: Folder, table: str, layout: Layout) -> None:
    """Write all parts of a table, and its index."""
    writer, records = IndexWriter(folder, table, layout.key("f")), {}
    for part in range(layout.num_parts):
        unit_rows = [len(layout.images_of(unit)) for unit in layout.units_of(part)]
        names = [f"{i:08d}.jpg" for i in range(sum(unit_rows))][: _ROWS_A_PART if table == "labels" else None]
        metadata = part_metadata(layout.key("f"), f'{{"images": {sum(unit_rows)}}}', unit_rows)
        data = to_parquet(pa.table({"image_id": names}), metadata, rows_apart=table == "labels")
        folder.write_bytes(part_name(table, part), data)
        record = describe_part(part, data, fingerprint=layout.key("f"), rows_apart=table == "labels")
        assert record is not None
        records[part] = record
    writer.finish(records)


def _on_store(config: RunConfig, layouts: dict[str, Layout], count: Any) -> dict[str, float]:
    folder = Folder("s3://bucket/run")
    for table, layout in layouts.items():
        _write_finished(folder, table, layout)
    job = Job(folder=folder, config=config, root=folder, resources=_ALONE, fingerprint="f", progress=Progress())
    before, start = count(), time.perf_counter()
    build_table_of_parts(job, "labels", images=_Names(_PHOTOGRAPHS), images_per_unit=16, worker=_Bank)
    found = {"s": time.perf_counter() - start, "requests of the check": count() - before}

    rows, before = read_index(folder, "labels").rows, count()
    drawn = np.random.default_rng(0).integers(0, 8 * _ROWS_A_PART, _ROWS_DRAWN)
    for place in rows.take(pa.array(drawn)).to_pylist():
        read_row(folder, "labels", place)
    found["sample"] = (count() - before) / _ROWS_DRAWN

    units, before = layouts["labels"].units_per_part, count()
    for unit in range(units):
        data = to_parquet(pa.table({"image_id": ["a"]}), part_metadata("f", '{"images": 1}', [1]))
        folder.write_bytes(unit_name("joined", 0, unit), data)
    build._merge(run_uri=folder.uri, table="joined", part=0, units=range(units), fingerprint="f", rows_apart=True)
    found["unit"] = (count() - before) / units
    return found


def _finished_run(folder: Path, count: int) -> Run:
    """Write empty photographs, which nobody opens, and the files of a run that finished with them."""
    for first in range(0, count, 1000):
        inside = folder / f"photographs/{first // 1000:05d}"
        inside.mkdir(parents=True)
        for number in range(first, min(first + 1000, count)):
            (inside / f"{number:08d}.jpg").touch()
    config = build_config(get_preset("paper"), None, [f"data.root={folder}/photographs", "data.dataset=folder"])
    run = Run.open(str(folder / "run"), config)
    for table, of in _TABLES.items():
        _write_finished(run.folder, table, Layout.of(count, 16, of.photograph_bytes(config)))
    inputs = stage_inputs(run, list_training(config))
    for stage in STAGES.lasting:
        run.write_manifest(stage, run.fingerprint(stage, inputs[stage]), {"rows_in": count, "rows_out": count})
    return run


def _call(run: Run) -> tuple[float, int]:
    """Return the seconds of a call that finds everything done, in a new process, and its peak memory, MB."""
    words = "import sys; from transfgu_ray.bench import many; many._bring_up_to_date(sys.argv[1])"
    start = time.perf_counter()
    # Words of its own.
    done = subprocess.run([sys.executable, "-c", words, run.folder.uri], check=True, capture_output=True)  # nosec B603
    return time.perf_counter() - start, int(done.stdout)


def _bring_up_to_date(uri: str) -> None:
    from transfgu_ray.engine.stream import peak_memory_mb

    class Silent:
        def stage(self, *_: Any) -> Any:
            raise AssertionError("something was not done")

        def note(self, text: str) -> None:
            raise AssertionError(text)

    run_stages(Run.open(uri, None), STAGES.lasting, address=None, reporter=Silent())
    sys.stdout.write(f"{peak_memory_mb()}")
