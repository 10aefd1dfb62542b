"""Files that only one of several processes can create, on a disk and on object stores."""

import contextlib
import errno
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from transfgu_ray.errors import ArtifactError
from transfgu_ray.storage import Folder

# Longer than a write takes that began when the last reader found nothing.
SETTLE_S = 2.0
_STORE_PATIENCE = timedelta(seconds=20)
# File systems without hard links, such as vfat and some mounted object stores.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


def create(folder: Folder, name: str, data: bytes) -> bool:
    """Write a file unless there is one; return whether this call wrote it.

    Of several calls at the same moment one alone is told so. On a store that cannot put under a condition it is the one
    whose content is still there after `SETTLE_S`, so the contents must differ.

    Raises:
        ArtifactError: the folder cannot be written.
        StorageError: the storage does not answer.
    """
    if folder.is_local:
        try:
            created = folder.patiently(name, lambda: _create_locally(Path(folder.join(name)), data))
        except OSError as error:
            raise ArtifactError(
                f"cannot write {folder.join(name)}: {error.strerror or error}; choose a writable folder with free space"
            ) from None
    else:
        known = _put_unless_there(folder, name, data)
        created = _settle(folder, name, data) if known is None else known
    # A first attempt may have written it though its answer was lost.
    return created or folder.find_bytes(name) == data


def _create_locally(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        scratch.write_bytes(data)
        # Unlike an exclusive open, it also works on NFS and shows the file with its content.
        os.link(scratch, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return _open_exclusively(path, data)


def _open_exclusively(path: Path, data: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(data)
        return True
    except FileExistsError:
        return False


def _put_unless_there(folder: Folder, name: str, data: bytes) -> bool | None:
    """Return whether an object store wrote the file; None if it cannot put under a condition, or obstore not reach it.

    pyarrow has no conditional put.
    """
    from obstore import put
    from obstore.exceptions import AlreadyExistsError, BaseError

    bucket, _, key = folder.join(name).partition("/")
    try:
        store = _store(folder, bucket)
        if store is None:
            return None
        put(store, key, data, mode="create")
    except AlreadyExistsError:
        return False
    except (BaseError, ValueError):
        return None
    try:
        # A store that ignores the condition overwrites it.
        put(store, key, data, mode="create")
    except AlreadyExistsError:
        return True
    except BaseError:
        pass
    return None


def _store(folder: Folder, bucket: str) -> Any:
    """Open the bucket in obstore with the settings that pyarrow takes from environment and URI; None if it cannot."""
    from obstore.store import from_url

    uri = urlsplit(folder.uri)
    given = {name: values[0] for name, values in parse_qs(uri.query).items()}
    options: dict[str, Any] = {
        "client_options": {"allow_http": True, "connect_timeout": "5s", "timeout": "10s"},
        "retry_config": {"max_retries": 10, "retry_timeout": _STORE_PATIENCE},
    }
    if folder.fs.type_name == "s3":
        if region := given.get("region") or folder.fs.region:
            options["region"] = region
        if endpoint := given.get("endpoint_override"):
            options["endpoint"] = endpoint if "://" in endpoint else f"{given.get('scheme', 'https')}://{endpoint}"
        return from_url(f"s3://{bucket}", **options)
    if folder.fs.type_name == "gcs":
        return from_url(f"gs://{bucket}", **options)
    if folder.fs.type_name == "abfs":
        return from_url(f"{uri.scheme}://{uri.netloc}", **options)
    return None


def _settle(folder: Folder, name: str, data: bytes) -> bool:
    """Write the file if there is none; of several processes that found none, the last one to write has it."""
    if folder.find_bytes(name) not in (None, data):
        return False
    folder.write_bytes(name, data)
    time.sleep(SETTLE_S)
    return folder.find_bytes(name) == data
