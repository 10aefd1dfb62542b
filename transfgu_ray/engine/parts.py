"""Tables made of parts, one a unit: which are there, and what their footers say."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from transfgu_ray.config.run import DataConfig, RunConfig
from transfgu_ray.datasets.listing import ImageRef
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.stream import Photo, UnitWorker, split_units, stream_units
from transfgu_ray.errors import DataError
from transfgu_ray.images import ImageRefused, decode_label, decode_rgb, to_classes
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder


def require_some(stats: Any, num_images: int) -> None:
    """Refuses a table that has none of its photographs.

    Raises:
        DataError: none could be used.
    """
    if not stats.images:
        first = stats.refused[0]
        raise DataError(
            f"none of {num_images} photographs can be used; the first, {first['image_id']}: {first['reason']}"
        )


def refusals(stats: Any, listed: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """What a manifest says of the photographs that went in, and of those refused.

    Args:
        stats: what became of those that were read.
        listed: refused before they were read.
    """
    refused = [*listed, *stats.refused]
    # What follows a colon is of the one photograph.
    reasons = Counter(refusal["reason"].partition(":")[0] for refusal in refused)
    return {"rows_in": stats.images + len(refused), "refused": refused, "refused_by_reason": dict(reasons)}


def batched_rows(items: np.ndarray, batch_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Batches of `batch_size` rows and which rows they are.

    A matrix product's last bits depend on its shape, but what a unit's batches hold depends on the unit alone.
    """
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        yield slice(start, start + len(batch)), batch


def part_name(table: str, unit: int) -> str:
    """The file of a unit."""
    return f"{table}/part-{unit:06d}.parquet"


@dataclass
class PartStats:
    """What became of a unit's photographs; kept in the part's footer, so that a kill loses none of it.

    Attributes:
        images: photographs that are in the table.
        refused: those that are not, each with its reason.
        dropped: crops (or the like) left out, by reason.
        halvings: how often a batch was halved, since the GPU had no memory for it.
    """

    images: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    halvings: int = 0

    def halve(self) -> None:
        """Counts a batch that was halved."""
        self.halvings += 1

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts something left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def add(self, other: "PartStats") -> None:
        """Counts another unit's photographs too."""
        self.images += other.images
        self.refused += other.refused
        self.halvings += other.halvings
        for reason, count in other.dropped.items():
            self.drop(reason, count)


def decode_photos(
    photos: Sequence[Photo], stats: PartStats, *, limits: DataConfig
) -> Iterator[tuple[Photo, Image.Image]]:
    """Yield each readable photograph with its decoded RGB image; the others are entered as refused."""
    for photo, image, _ in decode_labelled(photos, stats, limits=limits, table=None):
        yield photo, image


def decode_labelled(
    photos: Sequence[Photo], stats: PartStats, *, limits: DataConfig, table: np.ndarray | None
) -> Iterator[tuple[Photo, Image.Image, np.ndarray | None]]:
    """Yield each readable photograph with its decoded RGB image and its label's classes.

    Args:
        photos: as read.
        stats: what becomes of each is counted here; those that cannot be used are entered as refused.
        limits: sizes that are refused.
        table: see `to_classes`; None where no labels are wanted.
    """
    for photo in photos:
        try:
            if photo.data is None:
                raise ImageRefused(photo.error)
            image, classes = decode_rgb(photo.data, limits.min_side_px, limits.max_pixels), None
            if table is not None:
                if photo.label is None:
                    raise ImageRefused("its label cannot be read")
                classes = to_classes(decode_label(photo.label), table)
            yield photo, image, classes
        except ImageRefused as refusal:
            stats.refused.append({"image_id": photo.image_id, "reason": str(refusal)})
        else:
            stats.images += 1


def require_finite(values: np.ndarray, image_ids: Sequence[str], what: str) -> None:
    """Refuses numbers that would spread through everything after them.

    Args:
        values: a row an item.
        image_ids: the photograph of each row.
        what: they are, for the message.

    Raises:
        DataError: some are NaN or infinite.
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
        config: of the run.
        run: the run folder.
    """

    def __init__(
        self, config: RunConfig, run_uri: str, *, table: str, fingerprint: str, device: str, threads: int
    ) -> None:
        super().__init__(device, threads)
        self.config = config
        self.run = Folder(run_uri)
        self._table = table
        self._fingerprint = fingerprint

    def write(self, unit: int, table: pa.Table, *, stats: PartStats, row_group_size: int | None = None) -> bytes:
        """Writes the unit's part whole; returns how many photographs were refused, for the progress."""
        metadata = {"fingerprint": self._fingerprint, "stats": json.dumps(vars(stats))}
        self.run.write_bytes(part_name(self._table, unit), to_parquet(table, metadata, row_group_size))
        return str(len(stats.refused)).encode()


@dataclass
class TableResult:
    """A finished table.

    Attributes:
        stats: all parts together.
        num_rows: rows of all parts.
        num_parts: parts in all.
        num_resumed: parts that an earlier, interrupted call had left.
        peak_mb: highest peak memory of a worker, MB.
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
    """Make the parts of a table that are missing, then read every footer: it is complete when this returns.

    Args:
        job: where, by which settings and with what.
        table: its folder.
        images: photographs, in order; consecutive ones share a part.
        images_per_part: how many.
        worker: makes the parts; called with what `PartWorker` takes.
        arguments: further ones of the worker, by name.

    Raises:
        TransfguError: raised by a worker, because the user's input is wrong.
    """
    folder = job.folder
    units = dict(enumerate(split_units(images, images_per_part)))
    wanted = {part_name(table, unit): unit for unit in units}
    for name, _ in list(folder.files(table)):
        if name not in wanted or read_footer(folder, name, job.fingerprint) is None:
            folder.delete(name)
    present = {wanted[name] for name, _ in folder.files(table)}
    job.progress(sum(len(units[unit]) for unit in present))
    missing = {unit: refs for unit, refs in units.items() if unit not in present}
    given = {"config": job.config, "run_uri": folder.uri, "table": table, "fingerprint": job.fingerprint}
    peak_mb = 0
    for result in stream_units(
        job.root, missing, worker=worker, arguments=given | dict(arguments or {}), resources=job.resources
    ):
        peak_mb = max(peak_mb, result.peak_mb)
        job.progress(len(units[result.unit]), refused=int(result.result))
    total, num_rows = PartStats(), 0
    for name in wanted:
        footer = read_footer(folder, name, job.fingerprint)
        if footer is None:
            raise RuntimeError(f"{folder.uri_of(name)} was not written")
        stats, rows = footer
        num_rows += rows
        total.add(stats)
    return TableResult(total, num_rows, len(units), len(present), peak_mb)


def part_files(run: Folder, table: str) -> list[str]:
    """Names of a table's parts, in order of unit."""
    return [name for name, _ in run.files(table) if name.endswith(".parquet")]


def read_table(run: Folder, table: str, columns: list[str]) -> pa.Table:
    """Some columns of all parts, in order."""
    return pa.concat_tables([read_part(run, name, columns) for name in part_files(run, table)])


def read_part(run: Folder, name: str, columns: list[str]) -> pa.Table:
    """Some columns of one part."""
    return run.read(name, partial(pq.read_table, columns=columns)).replace_schema_metadata()


def read_row(run: Folder, name: str, row: int) -> dict[str, Any]:
    """One row of a part that has one row a row group."""
    record: dict[str, Any]
    (record,) = run.read(name, lambda file: pq.ParquetFile(file).read_row_group(row)).to_pylist()
    return record


def read_footer(run: Folder, name: str, fingerprint: str) -> tuple[PartStats, int] | None:
    """Stats and rows of a part; None if it is damaged or was made with other settings or input.

    Raises:
        ArtifactError: the storage does not answer.
    """
    try:
        footer = run.read(name, pq.read_metadata)
        metadata = footer.metadata or {}
        if metadata.get(b"fingerprint") != fingerprint.encode():
            return None
        return PartStats(**json.loads(metadata[b"stats"])), footer.num_rows
    except (OSError, pa.ArrowInvalid, ValueError, KeyError, TypeError):
        return None
