"""Folders, local or at any URI that pyarrow or fsspec opens; a file is written whole or not at all."""

import contextlib
import errno
import json
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from transfgu_ray.errors import ArtifactError, ConfigError

# KEY:SECRET@ in any scheme. A secret may hold slashes; digits and a slash after the colon are a port.
_PASSWORD = re.compile(r"://[^/@\s]*:(?!\d+/)[^@]*@")

# On the web, only a login stands before an @, so TOKEN@ is as good as a password.
_LOGIN = re.compile(r"https?://[^/@\s]+@")

_PARAMETER = re.compile(r"[?&][^=&#]*(passw|pwd|secret|token|credential|signature|api.?key)[^=&#]*=|[?&]sig=", re.I)


def refuse_credentials(name: str, value: str) -> None:
    """Refuse a URI that holds a password, a key or a token.

    Args:
        name: of the setting, for the message, which does not repeat the value.
        value: any text; text that is not a URI passes.

    Raises:
        ConfigError: it holds one.
    """
    if "://" in value and any(each.search(value) for each in (_PASSWORD, _LOGIN, _PARAMETER)):
        raise ConfigError(
            f"{name} holds a password, a key or a token, which would be kept with the results; leave it out of the URI "
            "and set it in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN for a tracking server, PGPASSWORD for PostgreSQL, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY for S3"
        )


# In an object store a file appears whole when its PUT ends; elsewhere a rename makes it so.
_ATOMIC_PUT = {"s3", "gcs", "abfs"}
_TMP_SUFFIX = ".tmp"
_READ_ATTEMPTS = 3
_Read = TypeVar("_Read")
# Errors of the whole disk rather than of a file.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def storage_failure(error: BaseException) -> ArtifactError | None:
    """Return the error to report if the storage itself failed (full, read-only, not answering); None for any other."""
    if not isinstance(error, OSError):
        return None
    reason = str(error).splitlines()[0]
    if error.errno in _DISK_ERRORS:
        return ArtifactError(f"the storage cannot be written: {reason}; choose a writable folder with free space")
    # pyarrow gives these errors no class and no number. A missing file is not a failure of the storage.
    if error.errno is None and "AWS Error" in reason:
        return ArtifactError(f"the storage does not answer: {reason}; the same command goes on once it does")
    return None


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a path or URI, and the path inside it.

    Raises:
        ArtifactError: the scheme is unknown or its library is missing.
        ConfigError: the URI holds a password.
    """
    refuse_credentials(f"a {uri.partition('://')[0]}:// URI", uri)
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        opened: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(uri)
        return opened
    except pa.ArrowInvalid:
        pass
    except (OSError, ImportError, ValueError) as error:
        # A missing library or network.
        raise ArtifactError(f"cannot open {uri}: {str(error).splitlines()[0]}") from None
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ArtifactError(f"cannot open {uri}: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def leads_out(name: str) -> bool:
    """Return whether a name leads out of its folder."""
    return name.startswith("/") or ".." in name.split("/")


class Folder:
    """A folder at a path or URI; names inside it are relative, use `/` and never lead out of it.

    Raises:
        ArtifactError: the scheme is unknown.
        ConfigError: the URI holds a password.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
        self.fs, self.path = resolve(uri)

    def join(self, name: str) -> str:
        """Return the full path of a name, for use with `fs`.

        Raises:
            ArtifactError: the name leads out of the folder.
        """
        self._check(name)
        return posixpath.join(self.path, name) if name else self.path

    def uri_of(self, name: str) -> str:
        """Return the path or URI of a name, for use in another process.

        Raises:
            ArtifactError: the name leads out of the folder.
        """
        self._check(name)
        return posixpath.join(self.uri, name)

    def _check(self, name: str) -> None:
        if leads_out(name):
            raise ArtifactError(f"{name} leads out of {self.uri}; names in a folder are relative and have no `..`")

    @property
    def is_local(self) -> bool:
        """Return whether the folder is on a file system of this machine."""
        return bool(self.fs.type_name == "local")

    def exists(self, name: str = "") -> bool:
        """Return whether a file or folder of that name exists."""
        return bool(self.fs.get_file_info(self.join(name)).type != pafs.FileType.NotFound)

    def is_file(self, name: str = "") -> bool:
        """Return whether a file, not a folder, of that name exists."""
        return bool(self.fs.get_file_info(self.join(name)).type == pafs.FileType.File)

    def files(self, name: str = "", recursive: bool = False) -> Iterator[tuple[str, int]]:
        """Yield (relative name, bytes) of a file or of those below a folder, sorted; nothing if neither exists."""
        info = self.fs.get_file_info(self.join(name))
        if info.type == pafs.FileType.File:
            yield name, info.size
            return
        selector = pafs.FileSelector(self.join(name), allow_not_found=True, recursive=recursive)
        found = self.fs.get_file_info(selector)
        prefix = self.path.rstrip("/") + "/"
        yield from sorted((i.path.removeprefix(prefix), i.size) for i in found if i.type == pafs.FileType.File)

    def read(self, name: str, reader: Callable[[pa.NativeFile], _Read]) -> _Read:
        """Read a file with a function and return its result.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ArtifactError: the storage does not answer.
        """
        for attempt in range(_READ_ATTEMPTS):
            try:
                with self.fs.open_input_file(self.join(name)) as file:
                    return reader(file)
            except OSError as error:
                failure = storage_failure(error)
                if failure is None:
                    raise
                # pyarrow itself retries an object store for some seconds, except if it reads fewer bytes than the
                # message of the refusal has.
                if attempt == _READ_ATTEMPTS - 1:
                    raise failure from None
        raise AssertionError("unreachable")

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file; see `read`."""
        content: bytes = self.read(name, lambda file: file.read())
        return content

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file; None if there is none.

        Raises:
            ValueError: the file is damaged.
        """
        return json.loads(self.read_bytes(name)) if self.exists(name) else None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file whole or not at all.

        Raises:
            ArtifactError: the storage cannot be written.
        """
        self.write_bytes(name, json.dumps(content, indent=1).encode())

    def try_read(self, name: str) -> tuple[bytes | None, str | None]:
        """Return the content of a file, or why it cannot be read.

        Raises:
            ArtifactError: the storage does not answer.
        """
        for attempt in range(_READ_ATTEMPTS):
            try:
                return self.read_bytes(name), None
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                return None, f"cannot be read: {error.strerror or 'not found'}"
            except OSError as error:
                # Network disks fail for moments; a lasting failure is the file's own.
                if attempt == _READ_ATTEMPTS - 1:
                    return None, f"cannot be read: {str(error).splitlines()[0][:120]}"
        raise AssertionError("unreachable")

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file that appears whole or not at all.

        Raises:
            ArtifactError: the target cannot be written.
        """
        target = self.join(name)
        direct = self.fs.type_name in _ATOMIC_PUT
        folder, base = posixpath.split(target)
        path = target if direct else posixpath.join(folder, f".{base}.{uuid.uuid4().hex[:8]}{_TMP_SUFFIX}")
        try:
            self.fs.create_dir(folder, recursive=True)
            with self.fs.open_output_stream(path) as stream:
                stream.write(data)
            if not direct:
                self.fs.move(path, target)
        except OSError as error:
            if not direct:
                with contextlib.suppress(OSError):
                    self.fs.delete_file(path)
            reason = error.strerror or str(error).splitlines()[0]
            advice = (
                "the same command goes on once the store answers"
                if direct
                else "choose a writable folder with free space"
            )
            raise ArtifactError(f"cannot write {target}: {reason}; {advice}") from None

    def copy_from(self, source: "Folder", name: str) -> None:
        """Copy a file of another folder under the same name, whole or not at all.

        On one local disk it becomes a hard link, which costs nothing: files here are replaced, never changed in place.

        Raises:
            ArtifactError: the target cannot be written.
        """
        if self.is_local and source.is_local:
            self.delete(name)
            self.fs.create_dir(posixpath.dirname(self.join(name)), recursive=True)
            # Fails across disks and on file systems without hard links.
            with contextlib.suppress(OSError):
                os.link(source.join(name), self.join(name))
                return
        self.write_bytes(name, source.read_bytes(name))

    def delete(self, name: str) -> None:
        """Remove a file or a whole folder; do nothing if there is none."""
        kind = self.fs.get_file_info(self.join(name)).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.join(name))
        elif kind == pafs.FileType.File:
            self.fs.delete_file(self.join(name))


def read_file(uri: str) -> bytes:
    """Return the content of a single file at a path or URI.

    Raises:
        OSError: there is no such file.
        ArtifactError: the scheme is unknown.
    """
    folder, _, name = uri.rpartition("/")
    return Folder(folder or ".").read_bytes(name)
