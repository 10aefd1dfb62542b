"""`stutter://` + a local path: a network disk that does not answer while a file of the campaign says so."""

import errno
import os
from typing import Any

from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from tests.faults.hooks import control

SCHEME = "stutter"
AWAY = "storage away"
# Those by which pyarrow and fsspec reach a disk; some would take a failure for an absent file.
_OPERATIONS = (
    "mkdir", "makedirs", "rmdir", "ls", "find", "walk", "info", "exists", "lexists", "isfile", "isdir", "cp_file", "mv",
    "rm_file", "rm", "touch", "created", "modified",
)  # fmt: skip


def _require_answer(number: int, path: object) -> None:
    if control(AWAY).exists():
        raise OSError(number, os.strerror(number), str(path))


class _File(LocalFileOpener):
    """An open file."""

    def read(self, *arguments: Any, **named: Any) -> Any:
        _require_answer(errno.EIO, self.path)
        return super().read(*arguments, **named)

    def write(self, *arguments: Any, **named: Any) -> Any:
        _require_answer(errno.EIO, self.path)
        return super().write(*arguments, **named)


class StutteringFileSystem(LocalFileSystem):
    """Local files; every operation fails as on NFS while the disk is away."""

    protocol = SCHEME

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return super()._strip_protocol(os.fspath(path).removeprefix(f"{SCHEME}://"))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **named: Any) -> _File:
        _require_answer(errno.EIO, path)
        return _File(path, mode, fs=self, **named)


def _answering(name: str) -> Any:
    inherited = getattr(LocalFileSystem, name)

    def operation(self: StutteringFileSystem, path: Any, *arguments: Any, **named: Any) -> Any:
        _require_answer(errno.ESTALE, path)
        return inherited(self, path, *arguments, **named)

    return operation


for _name in _OPERATIONS:
    setattr(StutteringFileSystem, _name, _answering(_name))
