"""Tar files as they lie: the members are found by their headers alone and read by their place."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa

from transfgu_ray.errors import DataError
from transfgu_ray.storage import Folder

# Compressed ones are found only to be refused, by what they begin with.
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_MAGIC = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
}
_BLOCK = 512
# After its end a tar is filled up with zeros, to 10 KiB unless told otherwise.
_TAIL_BYTES = 64 * 2**10
# Of one request to an object store, which costs as much as a few megabytes.
_BUFFER_BYTES = 2**20
# Neighbours are read together up to this size; between a photograph and the next lie its label and a caption.
_TOGETHER_BYTES, _GAP_BYTES = 32 * 2**20, 256 * 2**10


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar.

    Attributes:
        name: as stored.
        offset: of its content in the tar, bytes.
        num_bytes: size of its content.
        problem: why its content cannot be read; None if it can.
    """

    name: str
    offset: int
    num_bytes: int
    problem: str | None


class _Compressed(Exception):
    """A tar inside a compressed file; the message is the kind of compression."""


def list_members(root: Folder, name: str) -> tuple[Member, ...]:
    """Return the files in a tar, in order; folders are left out.

    Args:
        root: any folder.
        name: of the tar in it.

    Raises:
        DataError: it is compressed, damaged or cut short.
        OSError: there is no such file, or it is not to be read.
        StorageError: the storage does not answer.
    """

    def read() -> tuple[Member, ...]:
        with root.fs.open_input_file(root.join(name)) as file:
            # Some arrive a header at a time from a disk; from afar a request for each would take too long.
            stream = file if root.is_local else io.BufferedReader(file, _BUFFER_BYTES)
            try:
                return tuple(_read_headers(stream))
            except _Compressed as kind:
                raise DataError(
                    f"{root.uri_of(name)} is compressed ({kind}), so that no photograph in it can be read alone; "
                    "unpack it to a plain .tar: photographs are compressed by themselves"
                ) from None
            except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
                reason = " ".join(str(error).split())[:120]
                raise DataError(f"{root.uri_of(name)} is not a whole tar file: {reason}; write it again") from None

    found: tuple[Member, ...] = root.patiently(name, read)
    return found


def _read_headers(stream: io.BufferedReader | pa.NativeFile) -> Iterator[Member]:
    """Yield the files of a tar.

    Raises:
        tarfile.TarError, ValueError: it is damaged, as `tarfile` says, or in a way that `tarfile` takes for its end.
    """
    head = stream.read(_BLOCK)
    for kind, magic in _MAGIC.items():
        if head.startswith(magic):
            raise _Compressed(kind)
    stream.seek(0)
    # Names that are not UTF-8 keep their bytes, so that they can be shown and refused.
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            # Kept by `tarfile` for links, 1 kB each.
            tar.members.clear()  # type: ignore[attr-defined]
            if member.size < 0:
                raise tarfile.ReadError(f"the size of {member.name} is below 0")
            if not member.isdir():
                problem = None if member.isreg() and not member.issparse() else "link, device or sparse file in a tar"
                yield Member(member.name, member.offset_data, member.size, problem)
        stream.seek(tar.offset)
        tail = stream.read(_TAIL_BYTES)
    if len(tail) < _BLOCK:
        raise tarfile.ReadError("it is cut short: there is no mark of its end")
    if tail[:_BLOCK].strip(b"\0"):
        raise tarfile.ReadError(f"there is no header at byte {tar.offset}")
    if tail.strip(b"\0"):
        raise tarfile.ReadError("another tar was appended after its end; join them with `tar --concatenate`")


def read_members(root: Folder, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """Return the content of some members of a tar; None where the tar ends before it.

    Args:
        root: any folder.
        name: of the tar in it.
        ranges: offset and size of each.

    Raises:
        OSError: there is no such file, or it is not to be read.
        StorageError: the storage does not answer.
    """

    def read() -> dict[tuple[int, int], bytes | None]:
        found: dict[tuple[int, int], bytes | None] = {}
        with root.fs.open_input_file(root.join(name)) as file:
            end = file.size()
            whole = sorted(each for each in set(ranges) if sum(each) <= end)
            for some in _neighbours(whole):
                start = some[0][0]
                data = file.read_at(max(map(sum, some)) - start, start)
                found |= {(at, size): data[at - start : at - start + size] for at, size in some}
        return found

    found = root.patiently(name, read)
    return [found.get(each) for each in ranges]


def _neighbours(ranges: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """Yield runs of sorted ranges that are worth reading together."""
    start = 0
    for i, (one, other) in enumerate(pairwise(ranges), 1):
        if other[0] - sum(one) > _GAP_BYTES or sum(other) - ranges[start][0] > _TOGETHER_BYTES:
            yield ranges[start:i]
            start = i
    if ranges:
        yield ranges[start:]
