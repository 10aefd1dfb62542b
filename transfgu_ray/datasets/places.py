"""The place of an encoded image below a root, as one string: a file, a member of a tar, or a cell of a table.

| where | place | example |
|---|---|---|
| a file | its path | `photos/a.jpg` |
| a tar | TAR@OFFSET+SIZE, bytes | `train-000.tar@1536+48211` |
| a Parquet table | TABLE[COLUMN]#ROW_GROUP.ROW | `train-000.parquet[image.bytes]#3.17` |

Places of the last two end in digits, which no photograph's name does.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from transfgu_ray.datasets.tables import read_cells
from transfgu_ray.datasets.tars import read_members
from transfgu_ray.errors import DataError
from transfgu_ray.storage import Folder, read_file

# An object store answers after some 25 ms, however many files are asked for at once.
_READS_AT_ONCE = 16
_IN_TAR = re.compile(r"(.+\.tar)@(\d+)\+(\d+)", re.I | re.S)
_IN_TABLE = re.compile(r"(.+?\.parquet)\[(.+)\]#(\d+)\.(\d+)", re.I | re.S)


def in_tar(name: str, offset: int, num_bytes: int) -> str:
    """Return the place of a member of a tar."""
    return f"{name}@{offset}+{num_bytes}"


def in_table(name: str, column: str, group: int, row: int) -> str:
    """Return the place of a cell of a table."""
    return f"{name}[{column}]#{group}.{row}"


def shard_of(place: str) -> str:
    """Return the tar or table that a place is in; "" for a file."""
    found = _IN_TAR.fullmatch(place) or _IN_TABLE.fullmatch(place)
    return found[1] if found else ""


def read_places(root: Folder, places: Sequence[str]) -> list[tuple[bytes | None, str | None]]:
    """Return the encoded image at each place, or why it cannot be read; neighbours in a shard are read together.

    Args:
        root: of the dataset.
        places: below it.

    Raises:
        StorageError: the storage does not answer, which says nothing of the images.
    """
    found: dict[str, tuple[bytes | None, str | None]] = {}
    files: list[str] = []
    tars: dict[str, dict[str, tuple[int, int]]] = {}
    columns: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for place in places:
        if member := _IN_TAR.fullmatch(place):
            tars.setdefault(member[1], {})[place] = int(member[2]), int(member[3])
        elif cell := _IN_TABLE.fullmatch(place):
            columns.setdefault((cell[1], cell[2]), {})[place] = int(cell[3]), int(cell[4])
        else:
            files.append(place)
    if files:
        with ThreadPoolExecutor(min(_READS_AT_ONCE, len(files))) as threads:
            found |= zip(files, threads.map(root.try_read, files), strict=True)
    for name, ranges in tars.items():
        found |= _together(ranges, partial(read_members, root, name), "the tar ends before it")
    for (name, column), cells in columns.items():
        found |= _together(cells, partial(read_cells, root, name, column), "the row has no bytes")
    return [found[place] for place in places]


def _together(
    places: dict[str, tuple[int, int]],
    read: Callable[[list[tuple[int, int]]], list[bytes | None]],
    missing: str,
) -> dict[str, tuple[bytes | None, str | None]]:
    try:
        data = read([*places.values()])
    except (OSError, DataError) as error:
        return dict.fromkeys(places, (None, f"cannot be read: {error}"))
    return {place: (each, missing if each is None else None) for place, each in zip(places, data, strict=True)}


def read_uri(uri: str) -> bytes:
    """Return the encoded image at the path or URI of a place.

    Raises:
        OSError: it cannot be read.
        ArtifactError: the scheme is unknown.
        StorageError: the storage does not answer.
    """
    in_shard = _IN_TAR.fullmatch(uri) or _IN_TABLE.fullmatch(uri)
    if in_shard is None:
        return read_file(uri)
    folder, _, _ = in_shard[1].rpartition("/")
    ((data, problem),) = read_places(Folder(folder or "/"), [uri[len(folder) :].removeprefix("/")])
    if data is None:
        raise OSError(problem)
    return data
