"""References: tables of a run folder that lie in another run of the same sweep, so that no trial copies them."""

import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pyarrow as pa

from transfgu_ray.errors import ArtifactError
from transfgu_ray.storage import Folder

REFERENCES = "shared.json"
# Large, and read part by part; all other files of a run are few and small.
TABLES = ("features", "labels", "tokens")
_Read = TypeVar("_Read")


class RunFiles:
    """The files of a run folder, wherever they lie; to be read alone.

    Args:
        folder: the run folder.

    Raises:
        ArtifactError: shared.json is damaged.
    """

    def __init__(self, folder: Folder) -> None:
        self._own = folder
        self._others = {table: _follow(folder, path) for table, path in _references(folder).items()}

    def folder_of(self, name: str) -> Folder:
        """Return the run folder that holds a file, or the files of a table, under this name."""
        return self._others.get(name.partition("/")[0], self._own)

    def files(self, name: str, recursive: bool = False) -> Iterator[tuple[str, int]]:
        """Yield (name, bytes) of a file or of those below a folder; see `Folder.files`."""
        return self.folder_of(name).files(name, recursive)

    def dated_files(self, name: str, recursive: bool = False) -> Iterator[tuple[str, int, int | None]]:
        """Yield (name, bytes, when it was written) of a file or of those below a folder; see `Folder.dated_files`."""
        return self.folder_of(name).dated_files(name, recursive)

    def read(self, name: str, reader: Callable[[pa.NativeFile], _Read]) -> _Read:
        """Read a file with a function and return its result; see `Folder.read`."""
        return self.folder_of(name).read(name, reader)


def table_folder(run_folder: Folder, table: str) -> Folder:
    """Return the run folder that holds a table of a run: its own, or a shared one."""
    return RunFiles(run_folder).folder_of(table)


def refer(run_folder: Folder, table: str, holder: Folder) -> None:
    """Let a run use the table of another run in place of one of its own.

    The path between them is kept, so that both can be moved together.
    """
    path = posixpath.relpath(holder.uri, run_folder.uri)
    run_folder.write_json(REFERENCES, _references(run_folder) | {table: path})


def drop_references(run_folder: Folder, names: Iterable[str]) -> None:
    """Let a run use tables of its own again; the shared ones stay as they are."""
    found = _references(run_folder)
    kept = {table: path for table, path in found.items() if table not in set(names)}
    if kept == found:
        return
    if kept:
        run_folder.write_json(REFERENCES, kept)
    else:
        run_folder.delete(REFERENCES)


def _references(run_folder: Folder) -> dict[str, str]:
    """Return the path from a run folder to the one that holds it, of each table that lies elsewhere."""
    try:
        found: Any = run_folder.read_json(REFERENCES) or {}
        if isinstance(found, dict) and all(isinstance(path, str) for path in found.values()):
            return {table: path for table, path in found.items() if table in TABLES}
    except ValueError:
        pass
    raise ArtifactError(
        f"{run_folder.uri_of(REFERENCES)} is damaged; delete it, and the same command makes the tables in this folder"
    )


def _follow(run_folder: Folder, path: str) -> Folder:
    scheme, mark, place = run_folder.uri.rpartition("://")
    return Folder(f"{scheme}{mark}{posixpath.normpath(posixpath.join(place, path))}")
