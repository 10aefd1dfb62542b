"""A mark in every folder that a command writes pictures to, so that these are never taken for photographs."""

import posixpath
from collections.abc import Iterable

from transfgu_ray.storage import Folder

MARK = ".transfgu"
_HEAD = "# Written by transfgu. What is named here is its output and is not read as photographs."


def mark_outputs(folder: Folder, names: Iterable[str]) -> None:
    """Note that files or folders of these names are outputs, beside those already noted.

    Raises:
        ArtifactError: the folder cannot be written.
        StorageError: the storage does not answer.
    """
    noted = marked_outputs(folder, MARK)
    wanted = noted | set(names)
    if wanted != noted:
        folder.write_bytes(MARK, "\n".join([_HEAD, *sorted(wanted), ""]).encode())


def marked_outputs(root: Folder, mark: str) -> set[str]:
    """Return the outputs that a mark names.

    Args:
        root: any folder.
        mark: path of the mark in it; names are relative to the mark's folder, as are those returned to `root`.

    Raises:
        StorageError: the storage does not answer.
    """
    content = (root.find_bytes(mark) or b"").decode("utf-8", "replace")
    lines = (line.strip() for line in content.splitlines())
    folder = posixpath.dirname(mark)
    return {posixpath.join(folder, line) for line in lines if line and not line.startswith("#")}
