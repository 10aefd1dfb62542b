"""Encoded images to train on: photographs in a folder or in tars, or rows of Parquet tables."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transfgu_ray.datasets.found import list_found, list_in_shards
from transfgu_ray.datasets.listing import Listing, opening
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.datasets.places import read_places, shard_of
from transfgu_ray.datasets.shards import splits_of
from transfgu_ray.datasets.tables import ENDINGS, read_layout, read_rows
from transfgu_ray.datasets.tars import ENDINGS as TARS
from transfgu_ray.errors import DataError
from transfgu_ray.storage import Folder

NO_TABLE = "no table of images"
_IMAGES_PER_UNIT = 256
# Photographs that are in memory together.
_READ_TOGETHER = 16
# Splits that are trained on or measured.
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Unit:
    """Images that are read together.

    Attributes:
        split: "train" or "val".
        num_images: number of images, readable or not.
        table: Parquet file that holds them; "" where each has a place of its own.
        row_groups: of that table.
        first_row: row of the first image in the table.
        names: of the photographs, where there is no table.
        places: of the photographs, see `datasets.places`.
        labels: classes of the photographs; empty where there are none.
    """

    split: str
    num_images: int
    table: str = ""
    row_groups: tuple[int, ...] = ()
    first_row: int = 0
    names: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedImage:
    """One image as stored.

    Attributes:
        image_id: path of the file, or name in the tar or table; stable on every machine.
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
    """List images; shards named `train-*` and `val-*` are the splits, and where there are such, no other one is read.

    Args:
        uri: folder of photographs (in class folders or not), folder of Parquet tables or tars, or one of these files.
        setting: name of the setting that holds the path, for messages.
        option: its command-line option, for messages.

    Raises:
        DataError: there is nothing, a table is damaged, or a table has no column of images.
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
        if name.lower().endswith(TARS):
            return _photographs(parent, list_in_shards(parent, [name]))
        return _tables(parent, dict(parent.files(name)), {})
    files = dict(root.files())
    tables = {name: size for name, size in files.items() if name.endswith(ENDINGS)}
    if tables:
        return _tables(root, tables, {NO_TABLE: len(files) - len(tables)})
    return _photographs(root, list_found(uri))


def read_unit(root: Folder, unit: Unit) -> Iterator[EncodedImage]:
    """Yield the images of a unit, in order.

    Raises:
        DataError: a table is damaged.
        StorageError: the storage does not answer.
    """
    if unit.table:
        layout = read_layout(root, unit.table)
        for number, row in enumerate(read_rows(root, unit.table, layout, unit.row_groups), unit.first_row):
            error = None if row.data is not None else "the row has no bytes"
            yield EncodedImage(row.name or f"{unit.table}#{number}", row.label, row.data, error, row.mask)
        return
    labels = iter(unit.labels or [None] * len(unit.names))
    for start in range(0, len(unit.names), _READ_TOGETHER):
        some = slice(start, start + _READ_TOGETHER)
        for name, (data, error) in zip(unit.names[some], read_places(root, unit.places[some]), strict=True):
            yield EncodedImage(name, next(labels), data, error, None)


def _photographs(root: Folder, listing: Listing) -> Source:
    named = splits_of(listing.shards)
    of_shard = dict.fromkeys(("", *listing.shards), "train") if named is None else named
    images = {split: [i for i in listing.images if of_shard.get(shard_of(i.place)) == split] for split in _SPLITS}
    units = [unit for split, some in images.items() for unit in _units(split, some)]
    num_unread = sum(of_shard.get(shard) not in _SPLITS for shard in listing.shards)
    others = Counter(listing.passed_over) + Counter({NO_TABLE: num_unread})
    return Source(root, tuple(units), listing.fingerprint, dict(others), listing.refused)


def _units(split: str, images: Sequence[ImageRef]) -> Iterator[Unit]:
    """Yield units of photographs that have places of their own."""
    names, places = [image.image_id for image in images], [image.place for image in images]
    # Folders are classes if there are several and every photograph is one level deep.
    labels = [name.split("/")[0] for name in names] if all(name.count("/") == 1 for name in names) else []
    labels = labels if len(set(labels)) > 1 else []
    for start in range(0, len(names), _IMAGES_PER_UNIT):
        s = slice(start, start + _IMAGES_PER_UNIT)
        yield Unit(split, len(names[s]), names=tuple(names[s]), places=tuple(places[s]), labels=tuple(labels[s]))


def _tables(root: Folder, sizes: dict[str, int], passed_over: Mapping[str, int]) -> Source:
    named = splits_of(sizes)
    splits = {name: split for name, split in (named or dict.fromkeys(sizes, "train")).items() if split in _SPLITS}
    others = Counter(passed_over) + Counter({NO_TABLE: len(sizes) - len(splits)})
    units = [unit for name, split in splits.items() for unit in _table_units(root, name, split)]
    if not any(unit.split == "train" for unit in units):
        raise DataError(f"the tables in {root.uri} have no rows; give Parquet with encoded images in column `bytes`")
    text = "\n".join(f"{name}\t{sizes[name]}" for name in sorted(splits))
    return Source(root, tuple(units), hashlib.sha256(text.encode()).hexdigest(), dict(others))


def _table_units(root: Folder, name: str, split: str) -> Iterator[Unit]:
    counts = read_layout(root, name).group_rows
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
