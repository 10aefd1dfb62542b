"""Tables stored as one part per unit: which parts exist, and what their footers say."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.listing import ImageRef
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.stream import Photo, UnitWorker, split_units, stream_units
from transfgu_ray.errors import DataError
from transfgu_ray.images import ImageRefused, Limits, decode_pair
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder

_PART = re.compile(r"/part-(\d+)\.parquet$")


def require_some(stats: Any, num_images: int) -> None:
    """Refuse a table that has none of its photographs.

    Raises:
        DataError: no photograph could be used.
    """
    if not stats.images:
        first = stats.refused[0]
        raise DataError(
            f"none of {num_images} photographs can be used; the first, {first['image_id']}: {first['reason']}"
        )


def refusals(stats: Any, listed: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """Return the part of a manifest that counts the photographs read and lists those refused.

    Args:
        stats: outcome of those that were read.
        listed: refused before they were read.
    """
    refused = [*listed, *stats.refused]
    # What follows the colon differs from photograph to photograph.
    reasons = Counter(refusal["reason"].partition(":")[0] for refusal in refused)
    return {"rows_in": stats.images + len(refused), "refused": refused, "refused_by_reason": dict(reasons)}


def batched_rows(items: np.ndarray, batch_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield batches of `batch_size` rows, each with the slice of its rows.

    The last bits of a matrix product depend on its shape, so batches are cut from one unit alone.
    """
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        yield slice(start, start + len(batch)), batch


def part_name(table: str, unit: int) -> str:
    """Return the name of a unit's file."""
    return f"{table}/part-{unit:06d}.parquet"


def unit_of(name: str) -> int:
    """Return the unit of a part's file; the inverse of `part_name`."""
    found = _PART.search(name)
    if found is None:
        raise ValueError(f"{name} is no name of a part")
    return int(found[1])


@dataclass
class PartStats:
    """The outcome of a unit's photographs, kept in the part's footer so that a kill loses none of it.

    Attributes:
        images: number of photographs in the table.
        refused: the photographs left out, each with its reason.
        dropped: number of crops (or similar) left out, by reason.
        halvings: how often a batch was halved because it did not fit into GPU memory.
    """

    images: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    halvings: int = 0

    def halve(self) -> None:
        """Count a halved batch."""
        self.halvings += 1

    def drop(self, reason: str, count: int = 1) -> None:
        """Count items left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def add(self, other: "PartStats") -> None:
        """Add the counts of another unit."""
        self.images += other.images
        self.refused += other.refused
        self.halvings += other.halvings
        for reason, count in other.dropped.items():
            self.drop(reason, count)


def decode_photos(photos: Iterable[Photo], stats: PartStats, *, limits: Limits) -> Iterator[tuple[Photo, Image.Image]]:
    """Yield each readable photograph with its decoded RGB image; record the others as refused."""
    for photo, image, _ in decode_labelled(photos, stats, limits=limits, table=None):
        yield photo, image


def decode_labelled(
    photos: Iterable[Photo], stats: PartStats, *, limits: Limits, table: np.ndarray | None
) -> Iterator[tuple[Photo, Image.Image, np.ndarray | None]]:
    """Yield each readable photograph with its decoded RGB image and its label's classes.

    Args:
        photos: photographs as read.
        stats: counts the usable photographs and lists the others as refused.
        limits: what is refused, and which bands make the picture.
        table: see `to_classes`; None where no labels are wanted.
    """
    for photo in photos:
        try:
            if photo.data is None or (table is not None and photo.label is None):
                raise ImageRefused(photo.error or "its label cannot be read")
            image, classes = decode_pair(photo.data, photo.label, limits=limits, table=table)
            yield photo, image, classes
        except ImageRefused as refusal:
            stats.refused.append({"image_id": photo.image_id, "reason": str(refusal)})
        else:
            stats.images += 1


def require_finite(values: np.ndarray, image_ids: Sequence[str], what: str) -> None:
    """Refuse values that are not finite and would spread through everything after them.

    Args:
        values: one row per item.
        image_ids: the photograph of each row.
        what: name of the values, for the message.

    Raises:
        DataError: some values are NaN or infinite.
    """
    bad = ~np.isfinite(values).all(tuple(range(1, values.ndim)))
    if bad.any():
        names = sorted({image_ids[row] for row in np.flatnonzero(bad).tolist()})
        raise DataError(
            f"the {what} of {len(names)} photographs are NaN or infinite, the first, {names[0]}; try "
            "encoder.precision=float32, or other weights"
        )


class PartWorker(UnitWorker):
    """A worker whose units become Parquet parts of one table.

    Attributes:
        config: the run's configuration.
        run_folder: the run folder.
    """

    def __init__(
        self, config: RunConfig, run_uri: str, *, table: str, fingerprint: str, device: str, threads: int
    ) -> None:
        super().__init__(device, threads)
        self.config = config
        self.run_folder = Folder(run_uri)
        self._table = table
        self._fingerprint = fingerprint

    def write(self, unit: int, table: pa.Table, *, stats: PartStats, row_group_size: int | None = None) -> bytes:
        """Write the unit's part atomically; return the number of refused photographs as bytes, for the progress."""
        metadata = {"fingerprint": self._fingerprint, "stats": json.dumps(vars(stats))}
        self.run_folder.write_bytes(part_name(self._table, unit), to_parquet(table, metadata, row_group_size))
        return str(len(stats.refused)).encode()


@dataclass
class TableResult:
    """A finished table.

    Attributes:
        stats: sum over all parts.
        num_rows: rows of all parts.
        num_parts: number of parts.
        num_resumed: parts left by an earlier, interrupted call.
        peak_mb: highest peak memory of any worker, MB.
    """

    stats: PartStats
    num_rows: int
    num_parts: int
    num_resumed: int
    peak_mb: int


def build_table_of_parts(
    job: Job,
    table: str,
    *,
    images: Sequence[ImageRef],
    images_per_part: int,
    worker: Callable[..., PartWorker],
    arguments: Mapping[str, Any] | None = None,
) -> TableResult:
    """Make the missing parts of a table, and read the footer of each part: the table is complete when this returns.

    A part that is damaged or of other settings is made again and replaced, never deleted before.

    Args:
        job: folders, settings and resources.
        table: the table's folder.
        images: photographs, in order; consecutive ones share a part.
        images_per_part: photographs per part.
        worker: class that makes the parts; called with the arguments of `PartWorker`.
        arguments: further keyword arguments of the worker.

    Raises:
        TransfguError: raised by a worker because the user's input is wrong.
        StorageError: the storage does not answer.
    """
    folder = job.folder
    units = dict(enumerate(split_units(images, images_per_part)))
    wanted = {part_name(table, unit): unit for unit in units}
    present: dict[int, tuple[PartStats, int]] = {}
    for name, _ in folder.files(table):
        job.progress()
        if name not in wanted:
            folder.delete(name)
        elif (footer := read_footer(folder, name, job.fingerprint)) is not None:
            present[wanted[name]] = footer
    job.progress(sum(len(units[unit]) for unit in present))
    missing = {unit: refs for unit, refs in units.items() if unit not in present}
    given = {"config": job.config, "run_uri": folder.uri, "table": table, "fingerprint": job.fingerprint}
    peak_mb = 0
    for result in stream_units(
        job.root,
        missing,
        worker=worker,
        arguments=given | dict(arguments or {}),
        resources=job.resources,
        progress=job.progress,
    ):
        peak_mb = max(peak_mb, result.peak_mb)
        job.progress(len(units[result.unit]), refused=int(result.result))
    total, num_rows = PartStats(), 0
    for name, unit in wanted.items():
        job.progress()
        footer = present.get(unit) or read_footer(folder, name, job.fingerprint)
        if footer is None:
            raise RuntimeError(f"{folder.uri_of(name)} was not written")
        stats, rows = footer
        num_rows += rows
        total.add(stats)
    return TableResult(total, num_rows, len(units), len(present), peak_mb)


def part_files(run_folder: Folder, table: str) -> list[str]:
    """Return the names of a table's parts, in order of unit."""
    # As text, part-1000000 comes before part-999999.
    return sorted((name for name, _ in run_folder.files(table) if _PART.search(name)), key=unit_of)


def read_table(run_folder: Folder, table: str, columns: list[str]) -> pa.Table:
    """Read some columns of all parts, in order."""
    return pa.concat_tables([read_part(run_folder, name, columns) for name in part_files(run_folder, table)])


def read_part(run_folder: Folder, name: str, columns: list[str]) -> pa.Table:
    """Read some columns of one part."""
    return run_folder.read(name, partial(pq.read_table, columns=columns)).replace_schema_metadata()


def read_row(run_folder: Folder, name: str, row: int) -> dict[str, Any]:
    """Read one row of a part written with one row per row group."""
    record: dict[str, Any]
    (record,) = run_folder.read(name, lambda file: pq.ParquetFile(file).read_row_group(row)).to_pylist()
    return record


def read_footer(run_folder: Folder, name: str, fingerprint: str) -> tuple[PartStats, int] | None:
    """Return the stats and number of rows of a part; None if it is missing, damaged or from other settings or input.

    Raises:
        StorageError: the storage does not answer, which says nothing of the part.
    """
    try:
        footer = run_folder.read(name, pq.read_metadata)
        metadata = footer.metadata or {}
        if metadata.get(b"fingerprint") != fingerprint.encode():
            return None
        return PartStats(**json.loads(metadata[b"stats"])), footer.num_rows
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
