"""What a stage has left, file by file, so that damage done to it afterwards is found."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from transfgu_ray.storage import Folder

# Reading waits for the storage, and hashing frees the interpreter.
_THREADS = 8
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Mending:
    """What is kept of a stage whose damaged files are made again, until that is done.

    Attributes:
        damaged: their names.
        checksum: sha256 of the record of all files as they were.
    """

    damaged: list[str]
    checksum: str


def record_name(stage: str) -> str:
    """The file that lists a stage's files; apart from the manifest, since tables may have 100,000 parts."""
    return f"{stage}.files.json"


def checksum_files(folder: Folder, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of each file, by name.

    Args:
        folder: which holds them.
        sizes: bytes of each.
    """
    hashes = _hashes(folder, sizes)
    return {name: {"bytes": sizes[name], "sha256": hashes[name]} for name in sorted(sizes)}


def dump_record(files: Mapping[str, Any]) -> bytes:
    """The bytes of a record, a line a file; equal for equal files."""
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in files.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def find_damaged(folder: Folder, record: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """Names of files that are gone or no longer what the record says; the content of those of the right size is read.

    Args:
        folder: which holds them.
        record: what `checksum_files` gave.
        sizes: bytes of the files that are there.
    """
    whole = [name for name, entry in record.items() if sizes.get(name) == entry["bytes"]]
    hashes = _hashes(folder, whole)
    return [name for name, entry in record.items() if hashes.get(name) != entry["sha256"]]


def write_mending(folder: Folder, stage: str, mending: Mending) -> None:
    """Keeps it in place of the record."""
    folder.write_json(record_name(stage), asdict(mending))


def read_mending(folder: Folder, stage: str) -> Mending | None:
    """What `write_mending` kept; None where nothing is being mended."""
    try:
        return Mending(**(folder.read_json(record_name(stage)) or {}))
    except (ValueError, TypeError):
        return None


def _hashes(folder: Folder, names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(partial(_sha256, folder), names), strict=True))


def _sha256(folder: Folder, name: str) -> str:
    return folder.read(name, _hash_content)


def _hash_content(file: pa.NativeFile) -> str:
    found = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        found.update(chunk)
    return found.hexdigest()
