"""Folders, local or at any URI that pyarrow or fsspec opens; a file is written whole or not at all."""

import contextlib
import copy
import errno
import functools
import json
import logging
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from transfgu_ray.errors import ArtifactError, ConfigError, CredentialsError, StorageError, TransfguError

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


# Variables of these beginnings hold endpoints, regions and credentials.
_OF_CLIENTS = ("AWS_", "GOOGLE_", "CLOUDSDK_", "AZURE_", "STORAGE_EMULATOR")
# In an object store a file appears whole when its PUT ends; elsewhere a rename makes it so.
_OBJECT_STORES = {"s3", "gcs", "abfs"}
_TMP_SUFFIX = ".tmp"
_LOGGER = logging.getLogger("transfgu_ray")
_Result = TypeVar("_Result")

# What to do about a file of a run that has changed.
REMEDY = "`transfgu verify RUN` finds all such files, and the same command then makes them again"

# For how long a storage that fails is asked again, and the waits between, which double from the first to the longest.
RETRY_S = 60.0
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
# Google's client asks again for 15 minutes by itself; S3's sends three requests for an object of any size.
_OPTIONS = dict.fromkeys(("gs", "gcs"), "retry_limit_seconds=10") | {"s3": "allow_delayed_open=true"}

# Errors of the whole disk rather than of a file.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_PASSING = {errno.EIO, errno.ESTALE}
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)
# How stores give these answers where pyarrow and fsspec find neither class nor number for them.
_IN_WORDS = {
    errno.ENOENT: re.compile(r"AWS Error (NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND)\b|^Bucket '.*' not found"),
    errno.EACCES: re.compile(
        r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|"
        r"MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT)\b|^Forbidden: "
    ),
    errno.EISDIR: re.compile(r" is a directory$|Not a regular file: "),
    errno.ENOSYS: re.compile(r"^Unable to load lib"),
}
_HTTP_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
_STATUS_IN_WORDS = re.compile(r"AWS Error UNKNOWN \(HTTP status (\d{3})\)|Azure Error: \[[^]]*\] (\d{3}) ")
# An answer to HEAD has no body that could name the error; S3 gives this status to credentials that have expired.
_EXPIRED = re.compile(
    r"AWS Error UNKNOWN \(HTTP status 400\) during Head|AWS Error REQUEST_EXPIRED\b|"
    r"AWS Error .*Unable to parse ExceptionName: (ExpiredToken|TokenRefreshRequired|InvalidToken)"
)
_OF_STORES = re.compile(r"AWS Error|google::cloud::Status\(|Azure Error: \[")
# What fails in this program, a parser or its content. Anything else may come from the library of a store.
_OF_THE_PROGRAM = (
    *(TransfguError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError),
    *(ImportError, MemoryError, NameError, RuntimeError, StopIteration),
)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


def _number(error: BaseException) -> int | None:
    """Return the number of the error (`errno`) that a store's answer amounts to; None where it gave no answer."""
    response = getattr(error, "response", None)
    given = [getattr(each, name, None) for each in (error, response) for name in ("status", "status_code", "code")]
    reason = str(error).partition("\n")[0]
    if found := _STATUS_IN_WORDS.search(reason):
        given.append(int(found[1] or found[2]))
    numbers = [_HTTP_STATUS[each] for each in given if isinstance(each, int) and each in _HTTP_STATUS]
    numbers += [number for number, words in _IN_WORDS.items() if words.search(reason)]
    return numbers[0] if numbers else None


def _answer(error: Exception) -> Exception | None:
    """Return the error if time does not change it, e.g. a missing file; None if the storage may answer later."""
    if isinstance(error, OSError) and _EXPIRED.search(str(error)):
        return _unanswered(error)
    if isinstance(error, pa.ArrowException) and not isinstance(error, ValueError) and _OF_STORES.search(str(error)):
        # GCS: neither of these is an OSError.
        return None
    if isinstance(error, (*_OF_THE_PROGRAM, *_ANSWERS, pa.ArrowException)):
        return error
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = _number(error)
        return None if number is None else OSError(number, _reason(error))
    return error if number in _DISK_ERRORS | _MISSING | _FORBIDDEN else None


def _unanswered(error: BaseException, where: str = "") -> StorageError:
    reason = f"{where}: {_reason(error)}" if where else _reason(error)
    if _EXPIRED.search(str(error)):
        return CredentialsError(
            f"the storage takes no request with these credentials: {reason}; renew them if they have expired, then the "
            "same command goes on"
        )
    return StorageError(f"the storage does not answer: {reason}; the same command goes on once it does")


def patiently(action: Callable[[], _Result], where: str, *, seconds: float | None = None) -> _Result:
    """Do something with a storage, again and again for a while if the storage does not answer.

    Time is measured, not attempts, since some libraries ask for seconds by themselves.

    Args:
        action: can be repeated.
        where: file or folder, for the message.
        seconds: after which no further attempt begins; None = `RETRY_S`.

    Raises:
        StorageError: it did not answer in time.
        CredentialsError: it takes no request with these credentials, which is told at once.
        OSError: its answer, e.g. that there is no such file.
    """
    seconds = RETRY_S if seconds is None else seconds
    end, wait = time.monotonic() + seconds, FIRST_WAIT_S
    while True:
        try:
            return action()
        except Exception as error:
            answer = _answer(error)
            if answer is error:
                raise
            if answer is not None:
                raise answer from None
            left = end - time.monotonic()
            if left <= 0:
                raise _unanswered(error, where) from None
            if wait == FIRST_WAIT_S:
                _LOGGER.warning("%s: %s; trying again for up to %.0f s", where, _reason(error), left)
        time.sleep(min(wait, left))
        wait = min(2 * wait, LONGEST_WAIT_S)


def storage_failure(error: BaseException) -> ArtifactError | None:
    """Return the error to report if the storage itself failed (full, read-only, not answering); None for any other.

    Args:
        error: of any origin, so that only what certainly comes from a storage counts.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return ArtifactError(
            f"the storage cannot be written: {str(error).splitlines()[0]}; choose a writable folder with free space"
        )
    if isinstance(error, PermissionError):
        return ArtifactError(f"the storage refuses: {str(error).splitlines()[0]}; check permissions and credentials")
    of_a_store = isinstance(error, (OSError, pa.ArrowException)) and _OF_STORES.search(str(error))
    if of_a_store or (isinstance(error, OSError) and error.errno in _PASSING):
        return _unanswered(error)
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
        return patiently(lambda: _opened(uri), uri)
    except (OSError, ImportError, ValueError) as error:
        # A missing library, an unknown scheme or a bucket that is not there.
        raise ArtifactError(f"cannot open {uri}: {_reason(error)}") from None


def _opened(uri: str) -> tuple[pafs.FileSystem, str]:
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_OF_CLIENTS)))
    return _client(uri, settings)


@functools.lru_cache(maxsize=256)
def _client(uri: str, settings: tuple[tuple[str, str], ...]) -> tuple[pafs.FileSystem, str]:
    """Open a URI; once per process and settings, since a client holds the connections to its store.

    Args:
        uri: of any scheme.
        settings: variables of the environment that clients read.
    """
    scheme, _, rest = uri.partition("://")
    if scheme in _OPTIONS and f"{_OPTIONS[scheme].partition('=')[0]}=" not in rest:
        uri += f"{'&' if '?' in rest else '?'}{_OPTIONS[scheme]}"
    try:
        opened: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(uri)
        return opened
    except pa.ArrowInvalid:
        pass
    import fsspec

    fs, path = fsspec.core.url_to_fs(uri)
    return pafs.PyFileSystem(_StrictHandler(fs)), path


@functools.lru_cache(maxsize=4096)
def _opened_object(uri: str, path: str, num_bytes: int) -> pa.NativeFile:
    """Open an object, which holds no connection, once per process and size: opening asks the store for the size."""
    return _opened(uri)[0].open_input_file(path)


class _StrictHandler(pafs.FSSpecHandler):  # type: ignore[misc]
    """pyarrow's handler without its habit, and fsspec's, to take any error of a store for a missing file.

    Nor does it use listings that fsspec keeps: other processes write too.
    """

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        for path in paths:
            self.fs.invalidate_cache(path)
        found: list[pafs.FileInfo] = super().get_file_info(paths)
        return found

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        (top,) = self.get_file_info([selector.base_dir])
        if top.type == pafs.FileType.NotFound and selector.allow_not_found:
            return []
        if top.type != pafs.FileType.Directory:
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", selector.base_dir)
        depth = None if selector.recursive else 1
        walked = self.fs.walk(selector.base_dir, maxdepth=depth, detail=True, on_error="raise")
        found = [info for _, *kinds in walked for each in kinds for name, info in each.items() if name]
        return [self._create_file_info(info["name"], info) for info in found]

    def open_input_file(self, path: str) -> pa.PythonFile:
        (info,) = self.get_file_info([path])
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")

    open_input_stream = open_input_file

    def delete_file(self, path: str) -> None:
        self.fs.rm_file(path)

    def move(self, src: str, dest: str) -> None:
        from fsspec import AbstractFileSystem

        if type(self.fs).mv is AbstractFileSystem.mv:
            self.fs.cp_file(src, dest)
            self.fs.rm_file(src)
        else:
            self.fs.mv(src, dest)


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
        self._retry_s: float | None = None

    def once(self) -> "Folder":
        """Return the same folder, but one whose operations do not try again, for threads that must not wait."""
        found = copy.copy(self)
        found._retry_s = 0.0
        return found

    def patiently(self, name: str, action: Callable[[], _Result]) -> _Result:
        """Do something with a file of the folder that can be repeated; see the function of this name."""
        return patiently(action, self.uri_of(name) if name else self.uri, seconds=self._retry_s)

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

    @property
    def _is_object_store(self) -> bool:
        return self.fs.type_name in _OBJECT_STORES

    def exists(self, name: str = "") -> bool:
        """Return whether a file or folder of that name exists."""
        return bool(self._info(name).type != pafs.FileType.NotFound)

    def is_file(self, name: str = "") -> bool:
        """Return whether a file, not a folder, of that name exists."""
        return bool(self._info(name).type == pafs.FileType.File)

    def _info(self, name: str) -> pafs.FileInfo:
        return self.patiently(name, lambda: self.fs.get_file_info(self.join(name)))

    def files(self, name: str = "", recursive: bool = False) -> Iterator[tuple[str, int]]:
        """Yield (relative name, bytes) of a file or of those below a folder, sorted; nothing if neither exists."""
        yield from ((path, num_bytes) for path, num_bytes, _ in self.dated_files(name, recursive))

    def dated_files(self, name: str = "", recursive: bool = False) -> Iterator[tuple[str, int, int | None]]:
        """As `files`, with when each was last written, in ns by the storage's own clock; None where it does not say."""
        selector = pafs.FileSelector(self.join(name), allow_not_found=True, recursive=recursive)

        def listed() -> list[pafs.FileInfo]:
            found: list[pafs.FileInfo] = self.patiently(name, lambda: self.fs.get_file_info(selector))
            return found

        # An object store lists a file as an empty folder: one request, where it has folders, instead of three.
        found = listed() if self._is_object_store else []
        if not found:
            info = self._info(name)
            if info.type == pafs.FileType.File:
                yield name, info.size, info.mtime_ns
                return
            found = found if self._is_object_store else listed()
        prefix = self.path.rstrip("/") + "/"
        files = [(i.path.removeprefix(prefix), i.size, i.mtime_ns) for i in found if i.type == pafs.FileType.File]
        yield from sorted(files, key=itemgetter(0))

    def read(self, name: str, reader: Callable[[pa.NativeFile], _Result]) -> _Result:
        """Read a file with a function and return its result.

        Raises:
            FileNotFoundError, PermissionError, OSError: there is no such file, or it is not to be read.
            ValueError: raised by the function, as pa.ArrowInvalid is: the content is damaged.
            StorageError: the storage does not answer.
        """
        return self.patiently(name, lambda: self._read(name, reader))

    def _read(self, name: str, reader: Callable[[pa.NativeFile], _Result]) -> _Result:
        with self.fs.open_input_file(self.join(name)) as file:
            try:
                return reader(file)
            except OSError as error:
                if error.errno is not None:
                    raise
                # Parquet reports damaged content by the class of a failing disk, but only a disk fails here.
                file.seek(0)
                content = file.read()
        try:
            return reader(pa.BufferReader(content))
        except OSError as error:
            raise pa.ArrowInvalid(str(error)) from None

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file; see `read`."""
        content: bytes = self.read(name, lambda file: file.read())
        return content

    def read_range(self, name: str, offset: int, length: int, *, num_bytes: int) -> pa.Buffer:
        """Return some bytes of a file; an object store gives them for one request, after one that opens the file.

        Args:
            name: of the file, which is not written while this process lives, unless its size changes.
            offset: first byte.
            length: number of bytes.
            num_bytes: size of the whole file.

        Raises:
            FileNotFoundError, PermissionError, OSError: there is no such file, or it is not to be read.
            ArtifactError: the file is shorter.
            StorageError: the storage does not answer.
        """
        path = self.join(name)

        def read() -> bytes:
            if self._is_object_store:
                return bytes(_opened_object(self.uri, path, num_bytes).read_at(length, offset))
            with self.fs.open_input_file(path) as file:
                return bytes(file.read_at(length, offset))

        found = pa.py_buffer(self.patiently(name, read))
        if len(found) != length:
            raise ArtifactError(f"{self.uri_of(name)} is shorter than it was; {REMEDY}")
        return found

    def find_bytes(self, name: str) -> bytes | None:
        """Return the content of a file, None if there is none; see `read`."""
        try:
            return self.read_bytes(name)
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file; None if there is none.

        Raises:
            ValueError: the file is damaged.
            StorageError: the storage does not answer.
        """
        content = self.find_bytes(name)
        return None if content is None else json.loads(content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file whole or not at all.

        Raises:
            ArtifactError: the storage cannot be written.
        """
        self.write_bytes(name, json.dumps(content, indent=1).encode())

    def try_read(self, name: str) -> tuple[bytes | None, str | None]:
        """Return the content of a file, or why it cannot be read: it is missing or forbidden.

        Raises:
            StorageError: the storage does not answer, which says nothing of the file.
        """
        try:
            return self.read_bytes(name), None
        except OSError as error:
            return None, f"cannot be read: {_reason(error)[:120]}"

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file that appears whole or not at all.

        Raises:
            ArtifactError: the target cannot be written.
            StorageError: the storage does not answer.
        """
        try:
            self.patiently(name, lambda: self._write(self.join(name), data))
        except OSError as error:
            raise ArtifactError(
                f"cannot write {self.join(name)}: {_reason(error)}; choose a writable folder with free space"
            ) from None

    def _write(self, target: str, data: bytes | pa.Buffer) -> None:
        direct = self._is_object_store
        folder = posixpath.dirname(target)
        # Without the name itself, which may be as long as a file system allows.
        path = target if direct else posixpath.join(folder, f".{uuid.uuid4().hex[:16]}{_TMP_SUFFIX}")
        try:
            # Object stores have no folders; a request for each would only say so.
            if not direct:
                self.fs.create_dir(folder, recursive=True)
            with self.fs.open_output_stream(path) as stream:
                stream.write(data)
            if not direct:
                self.fs.move(path, target)
        except Exception:
            if not direct:
                with contextlib.suppress(Exception):
                    self.fs.delete_file(path)
            raise

    def copy_from(self, source: "Folder", name: str) -> None:
        """Copy a file of another folder under the same name, whole or not at all.

        On one local disk it becomes a hard link, which costs nothing: files here are replaced, never changed in place.

        Raises:
            ArtifactError: the target cannot be written.
            StorageError: the storage does not answer.
        """
        if self.is_local and source.is_local:
            self.delete(name)
            # Fails across disks and on file systems without hard links.
            with contextlib.suppress(OSError):
                folder = posixpath.dirname(self.join(name))
                self.patiently(name, lambda: self.fs.create_dir(folder, recursive=True))
                os.link(source.join(name), self.join(name))
                return
        self.write_bytes(name, source.read_bytes(name))

    def delete(self, name: str) -> None:
        """Remove a file or a whole folder; do nothing if there is none.

        Raises:
            StorageError: the storage does not answer.
        """
        self.patiently(name, lambda: self._delete(self.join(name)))

    def _delete(self, path: str) -> None:
        kind = self.fs.get_file_info(path).type
        # Another process, or an attempt whose answer was lost, may remove it first.
        with contextlib.suppress(FileNotFoundError):
            if kind == pafs.FileType.Directory:
                self.fs.delete_dir(path)
            elif kind == pafs.FileType.File:
                self.fs.delete_file(path)


def read_file(uri: str) -> bytes:
    """Return the content of a single file at a path or URI.

    Raises:
        OSError: there is no such file.
        ArtifactError: the scheme is unknown.
    """
    folder, _, name = uri.rpartition("/")
    return Folder(folder or ".").read_bytes(name)
