"""Tables of parts: what is there of an earlier call, and how the rest is made."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import (
    PartStats,
    PartWorker,
    UnitDone,
    read_footer,
    unit_name,
    unit_of,
    units_folder,
)
from transfgu_ray.engine.session import READER_CPUS
from transfgu_ray.engine.stream import stream_units, unwrapped_errors
from transfgu_ray.runs.index import IndexWriter, PartRecord, describe_part, is_of_index, part_metadata, part_name
from transfgu_ray.runs.tables import read_parquet, to_parquet
from transfgu_ray.storage import Folder

# A part has so many bytes at most, but no fewer units than let so many parts occupy all workers evenly.
_PART_BYTES = 2**27
_FEWEST_PARTS = 256
# Threads that wait for the storage together.
_READERS = 16
_MERGE_RETRIES = 3


@dataclass
class TableResult:
    """A finished table.

    Attributes:
        stats: sum over all parts.
        num_rows: rows of all parts.
        num_parts: number of parts.
        num_resumed: parts left by an earlier, interrupted call.
        num_units_resumed: units that such a call left of parts which it did not finish.
        peak_mb: highest peak memory of any worker, MB.
    """

    stats: PartStats
    num_rows: int
    num_parts: int
    num_resumed: int
    num_units_resumed: int
    peak_mb: int


@dataclass(frozen=True)
class Layout:
    """How photographs are cut into units, the unit of work and of resuming, and units into parts, the files.

    It depends on the photographs and settings alone, so the parts do not depend on who makes them.

    Attributes:
        num_images: number of photographs.
        images_per_unit: consecutive photographs of a unit.
        units_per_part: consecutive units of a part.
    """

    num_images: int
    images_per_unit: int
    units_per_part: int

    @classmethod
    def of(cls, num_images: int, images_per_unit: int, photograph_bytes: int) -> "Layout":
        """Choose the units of a part.

        Args:
            num_images: number of photographs.
            images_per_unit: photographs of a unit.
            photograph_bytes: bytes of the table for each photograph, about.
        """
        num_units = -(-num_images // images_per_unit)
        fill = _PART_BYTES // (images_per_unit * photograph_bytes)
        return cls(num_images, images_per_unit, max(1, min(fill, -(-num_units // _FEWEST_PARTS))))

    @property
    def num_units(self) -> int:
        """Return the number of units."""
        return -(-self.num_images // self.images_per_unit)

    @property
    def num_parts(self) -> int:
        """Return the number of parts."""
        return -(-self.num_units // self.units_per_part)

    def units_of(self, part: int) -> range:
        """Return the units of a part."""
        first = part * self.units_per_part
        return range(first, min(first + self.units_per_part, self.num_units))

    def images_of(self, unit: int) -> range:
        """Return the photographs of a unit, as indices."""
        first = unit * self.images_per_unit
        return range(first, min(first + self.images_per_unit, self.num_images))

    def num_images_of(self, part: int) -> int:
        """Return the number of photographs of a part."""
        units = self.units_of(part)
        return self.images_of(units[-1]).stop - self.images_of(units[0]).start

    def key(self, fingerprint: str) -> str:
        """Return what the footers of parts must hold: the fingerprint of settings and input, and the layout."""
        return f"{fingerprint}:{self.images_per_unit}x{self.units_per_part}"


class _Units(Mapping[int, Sequence[ImageRef]]):
    """The photographs of some units, by number, cut from the list when they are asked for."""

    def __init__(self, images: Sequence[ImageRef], layout: Layout, numbers: Sequence[int]) -> None:
        self._images, self._layout, self._numbers = images, layout, numbers

    def __getitem__(self, unit: int) -> Sequence[ImageRef]:
        rows = self._layout.images_of(unit)
        return self._images[rows.start : rows.stop]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


@dataclass
class _Stock:
    """What is there: records of parts, and the units of parts that are not."""

    records: dict[int, PartRecord] = field(default_factory=dict)
    units: set[int] = field(default_factory=set)


def build_table_of_parts(
    job: Job,
    table: str,
    *,
    images: Sequence[ImageRef],
    images_per_unit: int,
    worker: type[PartWorker],
    arguments: Mapping[str, Any] | None = None,
) -> TableResult:
    """Make what is missing of a table and its index: both are complete when this returns.

    Workers write units. Where a part has several, a task joins them as soon as all are there. A part that is damaged
    or of other settings is made again and replaced, never deleted before.

    Args:
        job: folders, settings and resources.
        table: the table's folder.
        images: photographs, in order; consecutive ones share a unit.
        images_per_unit: photographs per unit.
        worker: class that makes the units; called with the arguments of `PartWorker`.
        arguments: further keyword arguments of the worker.

    Raises:
        TransfguError: raised by a worker because the user's input is wrong.
        StorageError: the storage does not answer.
    """
    folder = job.folder
    layout = Layout.of(len(images), images_per_unit, worker.photograph_bytes(job.config))
    key = layout.key(job.fingerprint)
    index = IndexWriter(folder, table, key)
    stock = _take_stock(job, table, layout, index, rows_apart=worker.rows_apart)
    records, units = stock.records, stock.units
    num_resumed, num_units_resumed = len(records), len(units)
    job.progress(sum(map(layout.num_images_of, records)) + sum(len(layout.images_of(unit)) for unit in units))
    merges = _Merges(folder.uri, table, layout, key, rows_apart=worker.rows_apart)
    unfinished = [part for part in range(layout.num_parts) if part not in records]
    missing = [unit for part in unfinished for unit in layout.units_of(part) if unit not in units]
    for part in unfinished:
        merges.begin_if_whole(part, units)
    given = {
        "config": job.config, "run_uri": folder.uri, "table": table, "fingerprint": key,
        "units_per_part": layout.units_per_part, **dict(arguments or {}),
    }  # fmt: skip
    peak_mb = 0
    for result in stream_units(
        job.root,
        _Units(images, layout, missing),
        worker=worker,
        arguments=given,
        resources=job.resources,
        progress=job.progress,
    ):
        peak_mb = max(peak_mb, result.peak_mb)
        done = UnitDone.load(result.result)
        job.progress(len(layout.images_of(result.unit)), refused=done.refused)
        if done.record is None:
            units.add(result.unit)
            merges.begin_if_whole(result.unit // layout.units_per_part, units)
        for record in [done.record] if done.record is not None else merges.finished():
            records[record.part] = record
            index.add(record)
    for record in merges.rest():
        job.progress()
        records[record.part] = record
        index.add(record)
    if records.keys() != {*range(layout.num_parts)}:
        raise RuntimeError(f"{len(records)} of {layout.num_parts} parts of {folder.uri_of(table)} were written")
    index.finish(records)
    folder.delete(units_folder(table))
    total = PartStats()
    for part in sorted(records):
        total.add(PartStats(**json.loads(records[part].stats)))
    num_rows = sum(record.num_rows for record in records.values())
    return TableResult(total, num_rows, layout.num_parts, num_resumed, num_units_resumed, peak_mb)


def _take_stock(job: Job, table: str, layout: Layout, index: IndexWriter, *, rows_apart: bool) -> _Stock:
    """Return what an earlier call left, by one listing; delete files that are none of the table's.

    Parts that were written after the last piece of the index are read.
    """
    folder, key = job.folder, layout.key(job.fingerprint)
    indexed = index.read()
    stock, unread, leftovers = _Stock(), dict[int, str](), dict[int, str]()
    wanted = {part_name(table, part): part for part in range(layout.num_parts)}
    for name, num_bytes in folder.files(table, recursive=True):
        if is_of_index(name):
            continue
        unit, part = unit_of(name), wanted.get(name)
        if part is not None and part in indexed and indexed[part].num_bytes == num_bytes:
            stock.records[part] = indexed[part]
        elif part is not None:
            unread[part] = name
        elif unit in range(layout.num_units) and name == unit_name(table, unit // layout.units_per_part, unit):
            leftovers[unit] = name
        else:
            folder.delete(name)

    def read(part: int) -> PartRecord | None:
        data = pa.py_buffer(folder.read_bytes(unread[part]))
        return describe_part(part, data, fingerprint=key, rows_apart=rows_apart)

    with ThreadPoolExecutor(_READERS) as pool:
        for record in pool.map(read, unread):
            job.progress()
            if record is not None:
                stock.records[record.part] = record
                index.add(record)
        left = {unit for unit in leftovers if unit // layout.units_per_part not in stock.records}
        for part in {unit // layout.units_per_part for unit in leftovers if unit not in left}:
            # Its units were joined, but the call ended before they were deleted.
            folder.delete(units_folder(table, part))
        footers = pool.map(lambda unit: read_footer(folder, leftovers[unit], key), left)
        for unit, footer in zip(left, footers, strict=True):
            job.progress()
            if footer is not None:
                stock.units.add(unit)
    return stock


class _Merges:
    """The tasks that join the units of parts."""

    def __init__(self, run_uri: str, table: str, layout: Layout, key: str, *, rows_apart: bool) -> None:
        self._given = {"run_uri": run_uri, "table": table, "fingerprint": key, "rows_apart": rows_apart}
        self._layout = layout
        self._running: list[Any] = []

    def begin_if_whole(self, part: int, units: Container[int]) -> None:
        """Join the units of a part if all of them are among those that are there."""
        import ray

        of_part = self._layout.units_of(part)
        if all(unit in units for unit in of_part):
            # As Any: Ray's types for remote functions do not cover keyword arguments.
            function: Any = _merge
            task = ray.remote(function).options(
                num_cpus=READER_CPUS, max_retries=_MERGE_RETRIES, scheduling_strategy="DEFAULT"
            )
            self._running.append(task.remote(part=part, units=of_part, **self._given))

    def finished(self) -> Iterator[PartRecord]:
        """Yield the records of parts that have been joined by now."""
        import ray

        while self._running:
            done, self._running = ray.wait(self._running, timeout=0)
            if not done:
                return
            with unwrapped_errors():
                yield from ray.get(done)

    def rest(self) -> Iterator[PartRecord]:
        """Yield the records of all other parts, as they come."""
        import ray

        while self._running:
            done, self._running = ray.wait(self._running)
            with unwrapped_errors():
                yield from ray.get(done)


def _merge(
    *, run_uri: str, table: str, part: int, units: Iterable[int], fingerprint: str, rows_apart: bool
) -> PartRecord:
    """Join units to a part, and delete them after it."""
    folder, name = Folder(run_uri), part_name(table, part)
    try:
        found = [folder.read_bytes(unit_name(table, part, unit)) for unit in units]
    except FileNotFoundError:
        # The task was repeated after it had deleted them.
        data = pa.py_buffer(folder.read_bytes(name))
    else:
        tables, stats = [read_parquet(pa.BufferReader(unit)) for unit in found], PartStats()
        for unit in found:
            stats.add(PartStats(**json.loads(pq.read_metadata(pa.BufferReader(unit)).metadata[b"stats"])))
        metadata = part_metadata(fingerprint, json.dumps(vars(stats)), [each.num_rows for each in tables])
        data = to_parquet(pa.concat_tables(tables).combine_chunks(), metadata, rows_apart=rows_apart)
        folder.write_bytes(name, data)
        folder.delete(units_folder(table, part))
    record = describe_part(part, data, fingerprint=fingerprint, rows_apart=rows_apart)
    if record is None:
        raise RuntimeError(f"{folder.uri_of(name)} was not joined of its units")
    return record
