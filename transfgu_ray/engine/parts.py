"""Parts of tables: the workers that make them, a unit of photographs at a time, and how they are read."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.stream import Photo, UnitWorker
from transfgu_ray.errors import ArtifactError, DataError
from transfgu_ray.images import ImageRefused, Limits, decode_pair
from transfgu_ray.runs.index import PartRecord, describe_part, part_metadata, part_name
from transfgu_ray.runs.tables import read_parquet, to_parquet
from transfgu_ray.storage import REMEDY, Folder

_PART = re.compile(r"/part-(\d+)\.parquet$")
_UNIT = re.compile(r"/_units/\d+/unit-(\d+)\.parquet$")


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


def part_of(name: str) -> int:
    """Return the number of a part's file; the inverse of `part_name`."""
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


@dataclass(frozen=True)
class UnitDone:
    """What a worker says of a unit that it has written.

    Attributes:
        refused: number of refused photographs.
        record: of the part that is finished with it; None while other units of it may be missing.
    """

    refused: int
    record: PartRecord | None

    def dump(self) -> bytes:
        """Return it as bytes."""
        record = None if self.record is None else self.record.as_values()
        return json.dumps({"refused": self.refused, "record": record}).encode()

    @classmethod
    def load(cls, data: bytes) -> "UnitDone":
        """Return what `dump` was called on."""
        values = json.loads(data)
        record = values.pop("record")
        return cls(**values, record=None if record is None else PartRecord.of(record))


class PartWorker(UnitWorker):
    """A worker whose units become parts of one table.

    Attributes:
        config: the run's configuration.
        run_folder: the run folder.
        rows_apart: whether training reads single rows; see `to_parquet`.
    """

    rows_apart: ClassVar[bool] = False

    def __init__(
        self,
        config: RunConfig,
        run_uri: str,
        *,
        table: str,
        fingerprint: str,
        device: str,
        threads: int,
        units_per_part: int = 1,
    ) -> None:
        super().__init__(device, threads)
        self.config = config
        self.run_folder = Folder(run_uri)
        self._table = table
        self._fingerprint = fingerprint
        self._units_per_part = units_per_part

    @staticmethod
    def photograph_bytes(config: RunConfig) -> int:
        """Return about how many bytes of the table a photograph takes."""
        return 4096

    def write(self, unit: int, table: pa.Table, *, stats: PartStats) -> bytes:
        """Write the unit atomically, as a part where each unit is one; return `UnitDone` as bytes."""
        metadata = part_metadata(self._fingerprint, json.dumps(vars(stats)), [table.num_rows])
        part, alone = unit // self._units_per_part, self._units_per_part == 1
        name = part_name(self._table, unit) if alone else unit_name(self._table, part, unit)
        data = to_parquet(table, metadata, rows_apart=alone and self.rows_apart)
        self.run_folder.write_bytes(name, data)
        if not alone:
            return UnitDone(len(stats.refused), None).dump()
        record = describe_part(part, data, fingerprint=self._fingerprint, rows_apart=self.rows_apart)
        return UnitDone(len(stats.refused), record).dump()


def unit_name(table: str, part: int, unit: int) -> str:
    """Return the name of a unit's file while other units of its part are missing; readers of tables pass it over."""
    return f"{units_folder(table, part)}/unit-{unit:06d}.parquet"


def units_folder(table: str, part: int | None = None) -> str:
    """Return the folder of the units of an unfinished part; None = of all such parts."""
    return f"{table}/_units" if part is None else f"{table}/_units/{part:06d}"


def unit_of(name: str) -> int:
    """Return the unit of a file that `unit_name` names; -1 for any other file."""
    found = _UNIT.search(name)
    return -1 if found is None else int(found[1])


def part_files(run_folder: Folder, table: str) -> list[str]:
    """Return the names of a table's parts, in order."""
    # As text, part-1000000 comes before part-999999.
    return sorted((name for name, _ in run_folder.files(table) if _PART.search(name)), key=part_of)


def read_table(run_folder: Folder, table: str, columns: list[str]) -> pa.Table:
    """Read some columns of all parts, in order."""
    return pa.concat_tables([read_part(run_folder, name, columns) for name in part_files(run_folder, table)])


def read_part(run_folder: Folder, name: str, columns: list[str]) -> pa.Table:
    """Read some columns of one part.

    Raises:
        ArtifactError: it is damaged.
    """
    with _damage_told(run_folder, name):
        return run_folder.read(name, partial(read_parquet, columns=columns))


def read_rows(run_folder: Folder, name: str, columns: list[str], *, most: int) -> Iterator[pa.Table]:
    """Yield some columns of one part, at most so many rows at a time.

    Raises:
        ArtifactError: it is damaged.
    """
    with _damage_told(run_folder, name):
        part = pq.ParquetFile(pa.BufferReader(run_folder.read_bytes(name)), page_checksum_verification=True)
        for batch in part.iter_batches(most, columns=columns, use_threads=False):
            yield pa.Table.from_batches([batch])


def read_row(run_folder: Folder, table: str, place: Mapping[str, int]) -> dict[str, Any]:
    """Read one row of a table whose rows can be read one by one; one request to an object store.

    Args:
        run_folder: holds the table.
        table: its name.
        place: a row of `Index.rows`.

    Raises:
        ArtifactError: the part is damaged, or other than the index says.
    """
    name = part_name(table, place["part"])
    found = run_folder.read_range(name, place["offset"], place["length"], num_bytes=place["num_bytes"])
    record: dict[str, Any]
    with _damage_told(run_folder, name):
        try:
            (record,) = read_parquet(pa.BufferReader(found)).to_pylist()
        except OSError as error:
            # Of Parquet, not of a disk.
            raise pa.ArrowInvalid(str(error)) from None
    return record


@contextmanager
def _damage_told(run_folder: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        reason = str(error).partition("\n")[0]
        raise ArtifactError(f"{run_folder.uri_of(name)} is damaged: {reason}; {REMEDY}") from None


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
