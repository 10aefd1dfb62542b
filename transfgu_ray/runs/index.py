"""The index of a table: what each of its parts holds, so that nobody opens a part to know."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.tables import read_parquet, row_slices, to_parquet
from transfgu_ray.storage import Folder

# Readers of a folder of Parquet files pass over what begins so.
_FOLDER = "_index"
_WHOLE = "index.parquet"
_PIECE = "piece-"
# A piece is written after so many parts, or so many seconds: what a kill costs is reading so many parts again.
_RECORDS_PER_PIECE = 256
_SECONDS_PER_PIECE = 30.0
_SCHEMA = pa.schema(
    {
        "part": pa.int32(), "num_rows": pa.int64(), "num_bytes": pa.int64(), "sha256": pa.string(),
        "stats": pa.string(), "unit_rows": pa.list_(pa.int32()), "image_ids": pa.list_(pa.string()),
        "offsets": pa.list_(pa.int64()), "lengths": pa.list_(pa.int32()),
    }
)  # fmt: skip
_LISTS = ("unit_rows", "image_ids", "offsets", "lengths")


@dataclass(frozen=True)
class PartRecord:
    """What is known of a part, all of which follows from its bytes.

    Attributes:
        part: its number.
        num_rows: its rows.
        num_bytes: size of the file.
        sha256: of the file, hexadecimal.
        stats: the outcome of its photographs, as JSON.
        unit_rows: int32, rows of each of its units, in order.
        image_ids: photograph of each row; empty unless the rows can be read one by one.
        offsets: int64, first byte of each such row.
        lengths: int32, bytes of each such row.
    """

    part: int
    num_rows: int
    num_bytes: int
    sha256: str
    stats: str
    unit_rows: pa.Array
    image_ids: pa.Array
    offsets: pa.Array
    lengths: pa.Array

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "PartRecord":
        """Return the record of what `as_values` returned, or of such values without those of rows."""
        lists = {name: pa.array(values.get(name, ()), _SCHEMA.field(name).type.value_type) for name in _LISTS}
        return cls(**{**values, **lists})

    def as_values(self) -> dict[str, Any]:
        """Return it as plain values."""
        return vars(self) | {name: getattr(self, name).to_pylist() for name in _LISTS}


def part_metadata(fingerprint: str, stats: str, unit_rows: Iterable[int]) -> dict[str, str]:
    """Return what the footer of a part, or of a unit of one, must hold for `describe_part`."""
    return {"fingerprint": fingerprint, "stats": stats, "unit_rows": json.dumps([*unit_rows])}


def describe_part(part: int, data: pa.Buffer, *, fingerprint: str, rows_apart: bool) -> PartRecord | None:
    """Return the record of a part; None if it is damaged, or made with other settings or of other input.

    Args:
        part: its number.
        data: the bytes of the file.
        fingerprint: the one expected in its footer.
        rows_apart: whether its rows can be read one by one; see `to_parquet`.
    """
    try:
        footer = pq.read_metadata(pa.BufferReader(data))
        found = footer.metadata or {}
        if found.get(b"fingerprint") != fingerprint.encode():
            return None
        rows: dict[str, Any] = {}
        if rows_apart:
            image_ids = read_parquet(pa.BufferReader(data), ["image_id"])["image_id"].to_pylist()
            offsets, lengths = row_slices(footer, len(data))
            rows = {"image_ids": image_ids, "offsets": offsets, "lengths": lengths}
        values = {
            "part": part,
            "num_rows": footer.num_rows,
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "stats": found[b"stats"].decode(),
            "unit_rows": json.loads(found[b"unit_rows"]),
        }
        return PartRecord.of(values | rows)
    except (OSError, ValueError, KeyError):
        return None


class Index:
    """The index of a finished table."""

    def __init__(self, records: pa.Table) -> None:
        self._records = records
        self._edges_of_units: np.ndarray | None = None

    @property
    def sizes(self) -> dict[int, int]:
        """Return the rows of each part, by number, in order."""
        parts, rows = (self._records[name].to_pylist() for name in ("part", "num_rows"))
        return dict(zip(parts, rows, strict=True))

    @property
    def image_ids(self) -> pa.Array:
        """Return the image_id of each row of a table whose rows can be read one by one."""
        return self._flat("image_ids")

    @property
    def rows(self) -> pa.Table:
        """Return where to read each row: part, num_bytes of its file, offset and length, bytes."""
        each = np.diff(self._records["offsets"].combine_chunks().offsets.to_numpy())
        of_parts = {name: np.repeat(self._records[name].to_numpy(), each) for name in ("part", "num_bytes")}
        return pa.table({**of_parts, "offset": self._flat("offsets"), "length": self._flat("lengths")})

    def image_ids_of(self, unit: int) -> list[str]:
        """Return the image_ids of the rows that one unit of photographs has; see `image_ids`."""
        if self._edges_of_units is None:
            self._edges_of_units = np.concatenate([[0], np.cumsum(self._flat("unit_rows").to_numpy())])
        start, stop = self._edges_of_units[unit : unit + 2]
        found: list[str] = self.image_ids.slice(start, stop - start).to_pylist()
        return found

    def _flat(self, name: str) -> pa.Array:
        return self._records[name].combine_chunks().flatten()


def read_index(run_folder: Folder, table: str) -> Index:
    """Read the index of a finished table.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    name = f"{table}/{_FOLDER}/{_WHOLE}"
    try:
        return Index(run_folder.read(name, read_parquet))
    except (FileNotFoundError, pa.ArrowInvalid):
        raise ArtifactError(
            f"{run_folder.uri_of(name)}, which says where the rows of {table} are, is missing, damaged or of an "
            "earlier version; make the table again with its stage and --overwrite"
        ) from None


def indexed_checksums(run_folder: Folder, table: str) -> dict[str, str]:
    """Return the sha256 of each part of a table, by name, as its writer took it; empty without an index."""
    name = f"{table}/{_FOLDER}/{_WHOLE}"
    try:
        records = run_folder.read(name, lambda file: read_parquet(file, ["part", "sha256"]))
    except (FileNotFoundError, pa.ArrowInvalid):
        return {}
    return {part_name(table, part): sha256 for part, sha256 in zip(*records.to_pydict().values(), strict=True)}


def part_name(table: str, part: int) -> str:
    """Return the name of a part's file."""
    return f"{table}/part-{part:06d}.parquet"


def is_of_index(name: str) -> bool:
    """Return whether a file below a table's folder belongs to its index."""
    return f"/{_FOLDER}/" in name


class IndexWriter:
    """Writes an index piece by piece while its parts are made, and as one file once all are there.

    Args:
        run_folder: holds the table.
        table: its name.
        fingerprint: of the settings and input of its parts.
    """

    def __init__(self, run_folder: Folder, table: str, fingerprint: str) -> None:
        self._folder, self._at, self._fingerprint = run_folder, f"{table}/{_FOLDER}", fingerprint
        self._waiting: list[PartRecord] = []
        self._num_pieces = 0
        self._written_at = time.monotonic()

    def read(self) -> dict[int, PartRecord]:
        """Return the records that an earlier, interrupted call left, by part; damaged and foreign ones are deleted."""
        records: dict[int, PartRecord] = {}
        for name, _ in self._folder.files(self._at):
            found = self._read_piece(name)
            if found is None:
                self._folder.delete(name)
                continue
            records |= {record.part: record for record in found}
            number = name.rpartition(_PIECE)[2].removesuffix(".parquet")
            if number.isdigit():
                self._num_pieces = max(self._num_pieces, int(number) + 1)
        return records

    def add(self, record: PartRecord) -> None:
        """Note a part that has been written."""
        self._waiting.append(record)
        if len(self._waiting) >= _RECORDS_PER_PIECE or time.monotonic() > self._written_at + _SECONDS_PER_PIECE:
            self._write(f"{_PIECE}{self._num_pieces:06d}.parquet", self._waiting)
            self._num_pieces += 1
            self._waiting, self._written_at = [], time.monotonic()

    def finish(self, records: Mapping[int, PartRecord]) -> None:
        """Write the index of all parts; its pieces are deleted after it."""
        self._write(_WHOLE, [records[part] for part in sorted(records)])
        for name, _ in self._folder.files(self._at):
            if not name.endswith(f"/{_WHOLE}"):
                self._folder.delete(name)

    def _write(self, name: str, records: Iterable[PartRecord]) -> None:
        # One by one: a million rows as Python's objects take a gigabyte.
        rows = [pa.Table.from_pylist([record.as_values()], _SCHEMA) for record in records]
        table = pa.concat_tables([_SCHEMA.empty_table(), *rows]).combine_chunks()
        self._folder.write_bytes(f"{self._at}/{name}", to_parquet(table, {"fingerprint": self._fingerprint}))

    def _read_piece(self, name: str) -> list[PartRecord] | None:
        try:
            footer, table = self._folder.read(name, lambda file: (pq.read_metadata(file), read_parquet(file)))
            if (footer.metadata or {}).get(b"fingerprint") != self._fingerprint.encode():
                return None
            return [PartRecord.of(row) for batch in table.to_batches(1) for row in batch.to_pylist()]
        except (FileNotFoundError, ValueError, TypeError):
            return None
