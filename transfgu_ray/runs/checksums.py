"""Checksums of the files that a stage wrote, to find damage done afterwards."""

import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from transfgu_ray.storage import Folder

# Threads pay: reading waits for the storage, and hashing releases the GIL.
_THREADS = 8
_CHUNK_BYTES = 2**22
_Read = TypeVar("_Read")


class Readable(Protocol):
    """A folder, or several that hold the files together."""

    def read(self, name: str, reader: Callable[[pa.NativeFile], _Read]) -> _Read:
        """Read a file with a function and return its result."""


@dataclass(frozen=True)
class Mending:
    """The record kept of a stage while its damaged files are made again.

    Attributes:
        damaged: names of the damaged files.
        checksum: sha256 of the record of all files before the damage.
    """

    damaged: list[str]
    checksum: str


def record_name(stage: str) -> str:
    """Return the name of the file that lists a stage's files; not the manifest, as tables may have 100,000 parts."""
    return f"{stage}.files.json"


def checksum_files(
    folder: Readable, sizes: Mapping[str, int], known: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Return the bytes and sha256 of each file, by name.

    Args:
        folder: holds the files.
        sizes: bytes of each file.
        known: sha256 of files that are not read, as whoever wrote them took it.
    """
    hashes = hash_files(folder, [name for name in sizes if name not in known]) | dict(known)
    return {name: {"bytes": sizes[name], "sha256": hashes[name]} for name in sorted(sizes)}


def dump_record(files: Mapping[str, Any]) -> bytes:
    """Return a record as bytes, one line per file; equal for equal files."""
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in files.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def find_damaged(
    folder: Readable, record: Mapping[str, Any], sizes: Mapping[str, int], untouched: Container[str]
) -> list[str]:
    """Return the names of files that are missing or differ from the record.

    Args:
        folder: holds the files.
        record: result of `checksum_files`.
        sizes: bytes of the files that exist.
        untouched: files that nobody has written since the record; their size is enough.
    """
    whole = [name for name, entry in record.items() if sizes.get(name) == entry["bytes"]]
    hashes = hash_files(folder, [name for name in whole if name not in untouched])
    return [
        name
        for name, entry in record.items()
        if sizes.get(name) != entry["bytes"] or hashes.get(name, entry["sha256"]) != entry["sha256"]
    ]


def write_mending(folder: Folder, stage: str, mending: Mending) -> None:
    """Write it in place of the record."""
    folder.write_json(record_name(stage), asdict(mending))


def read_mending(folder: Folder, stage: str) -> Mending | None:
    """Return what `write_mending` wrote; None where nothing is being mended."""
    try:
        return Mending(**(folder.read_json(record_name(stage)) or {}))
    except (ValueError, TypeError):
        return None


def hash_files(folder: Readable, names: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of each file, by name."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(partial(_sha256, folder), names), strict=True))


def _sha256(folder: Readable, name: str) -> str:
    return folder.read(name, _hash_content)


def _hash_content(file: pa.NativeFile) -> str:
    found = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        found.update(chunk)
    return found.hexdigest()
