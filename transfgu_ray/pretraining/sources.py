"""Encoded images to train on: photographs in a folder, or rows of Parquet tables."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transfgu_ray.datasets import FOLDER
from transfgu_ray.datasets.listing import list_images, opening
from transfgu_ray.errors import DataError
from transfgu_ray.storage import Folder

NO_TABLE = "no table of images"
# Of a table; only `bytes` is required.
_COLUMNS = ("bytes", "path", "label", "mask")
_IMAGES_PER_UNIT = 256
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Unit:
    """Images that are read together.

    Attributes:
        split: "train" or "val".
        num_images: number of images, readable or not.
        table: Parquet file that holds them; "" where each is a file.
        row_groups: of that table.
        first_row: row of the first image in the table.
        names: of the files, where there is no table.
        labels: classes of the files; empty where there are none.
    """

    split: str
    num_images: int
    table: str = ""
    row_groups: tuple[int, ...] = ()
    first_row: int = 0
    names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedImage:
    """One image as stored.

    Attributes:
        image_id: path of the file, or the row's `path`; stable on every machine.
        label: its class; None where there is none.
        data: encoded bytes; None if it could not be read.
        error: why it could not be read.
        mask: encoded mask, 255 = object; None where there is none.
    """

    image_id: str
    label: str | None
    data: bytes | None
    error: str | None
    mask: bytes | None


@dataclass(frozen=True)
class Source:
    """The images at a path or URI.

    Attributes:
        root: the folder.
        units: all images, in order.
        fingerprint: hash of names and sizes of the files.
        passed_over: number of files that are not read, by reason; see `Listing`.
        refused: unusable names, each with its reason.
    """

    root: Folder
    units: tuple[Unit, ...]
    fingerprint: str
    passed_over: Mapping[str, int]
    refused: tuple[dict[str, str], ...] = ()

    def num_images(self, split: str) -> int:
        """Return the number of images of a split, readable or not."""
        return sum(unit.num_images for unit in self.units if unit.split == split)


def open_source(uri: str, setting: str, option: str) -> Source:
    """List images; tables named `train-*` and `val-*` are the splits, and where there are such, no other table is read.

    Args:
        uri: folder of photographs (in class folders or not), folder of Parquet tables, or one table.
        setting: name of the setting that holds the path, for messages.
        option: its command-line option, for messages.

    Raises:
        DataError: there is nothing, a table is damaged, or a table has no column `bytes`.
        StorageError: the storage does not answer.
    """
    if not uri:
        raise DataError(f"no images were named; give {option} DIR or set {setting}")
    with opening(f"{setting}={uri}"):
        root = Folder(uri)
        found, is_file = root.exists(), root.is_file()
    if not found:
        raise DataError(f"{setting}={uri} does not exist; give a folder of images or Parquet tables with {option}")
    if is_file:
        folder, _, name = root.uri.rpartition("/")
        parent = Folder(folder)
        return _tables(parent, dict(parent.files(name)), {})
    files = dict(root.files())
    tables = {name: size for name, size in files.items() if name.endswith(".parquet")}
    return _tables(root, tables, {NO_TABLE: len(files) - len(tables)}) if tables else _photographs(uri)


def read_unit(root: Folder, unit: Unit) -> Iterator[EncodedImage]:
    """Yield the images of a unit, in order.

    Raises:
        DataError: a table is damaged.
        StorageError: the storage does not answer.
    """
    if not unit.table:
        for name, label in zip(unit.names, unit.labels or [None] * len(unit.names), strict=True):
            yield EncodedImage(name, label, *root.try_read(name), None)
        return
    number = unit.first_row
    try:
        table = root.read(unit.table, partial(_read_rows, row_groups=unit.row_groups))
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(root, unit.table, error) from None
    for batch in table.to_batches(_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield _from_row(row, f"{unit.table}#{number}")
            number += 1


def _read_rows(file: pa.NativeFile, row_groups: Sequence[int]) -> pa.Table:
    table = pq.ParquetFile(file)
    columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
    return table.read_row_groups(list(row_groups), columns=columns)


def _from_row(row: dict[str, Any], name: str) -> EncodedImage:
    label, data = row.get("label"), row["bytes"]
    return EncodedImage(
        image_id=str(row.get("path") or name),
        label=None if label is None else str(label),
        data=data,
        error=None if data is not None else "the row has no bytes",
        mask=row.get("mask"),
    )


def _photographs(uri: str) -> Source:
    listing = list_images(uri, FOLDER, split="")
    names = [image.image_id for image in listing.images]
    # Folders are classes if there are several and every photograph is one level deep.
    labels = [name.split("/")[0] for name in names] if all(name.count("/") == 1 for name in names) else []
    labels = labels if len(set(labels)) > 1 else []
    slices = [slice(start, start + _IMAGES_PER_UNIT) for start in range(0, len(names), _IMAGES_PER_UNIT)]
    units = [Unit("train", len(names[s]), names=tuple(names[s]), labels=tuple(labels[s])) for s in slices]
    return Source(Folder(uri), tuple(units), listing.fingerprint, listing.passed_over, listing.refused)


def _tables(root: Folder, sizes: dict[str, int], passed_over: Mapping[str, int]) -> Source:
    splits = {name: split for name in sizes if (split := _split(name)) is not None}
    if "train" not in splits.values():
        splits = dict.fromkeys(sizes, "train")
    others = Counter(passed_over) + Counter({NO_TABLE: len(sizes) - len(splits)})
    units = [unit for name, split in splits.items() for unit in _table_units(root, name, split)]
    if not any(unit.split == "train" for unit in units):
        raise DataError(f"the tables in {root.uri} have no rows; give Parquet with encoded images in column `bytes`")
    text = "\n".join(f"{name}\t{sizes[name]}" for name in sorted(splits))
    return Source(root, tuple(units), hashlib.sha256(text.encode()).hexdigest(), dict(others))


def _split(name: str) -> str | None:
    """Return the split named by a table such as `train-00000-of-00004.parquet`; None for any other name."""
    start = name.removesuffix(".parquet").split("-")[0]
    return {"train": "train", "val": "val", "validation": "val"}.get(start)


def _table_units(root: Folder, name: str, split: str) -> Iterator[Unit]:
    try:
        schema, counts = root.read(name, _read_layout)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(root, name, error) from None
    if "bytes" not in schema.names or not _is_binary(schema.field("bytes").type):
        raise DataError(
            f"{root.uri_of(name)} has no binary column `bytes` of encoded images; its columns are "
            f"{', '.join(schema.names)}"
        )
    groups: list[int] = []
    first = count = 0
    for group, rows in enumerate(counts):
        groups.append(group)
        count += rows
        # Small row groups are read together.
        if count >= _IMAGES_PER_UNIT or group == len(counts) - 1:
            if count:
                yield Unit(split, count, name, tuple(groups), first)
            groups, first, count = [], first + count, 0


def _read_layout(file: pa.NativeFile) -> tuple[pa.Schema, list[int]]:
    """Return the schema of a table and the number of rows of each row group."""
    table = pq.ParquetFile(file)
    return table.schema_arrow, [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _damaged(root: Folder, name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:120]
    return DataError(f"{root.uri_of(name)} is not a readable Parquet file: {reason}; write it again")
