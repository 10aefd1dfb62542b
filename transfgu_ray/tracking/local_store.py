"""The sqlite store of MLflow on this machine: its URI, how it is made, and what is refused before MLflow opens it."""

import contextlib
import functools
import os
import shlex
import sqlite3
import tempfile
from pathlib import Path

from transfgu_ray.errors import ConfigError

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def store_uri(file: Path) -> str:
    """Return the URI under which MLflow opens a sqlite file, whose path may hold any characters."""
    from sqlalchemy import URL, make_url

    plain = f"sqlite:///{file}"
    if make_url(plain).database == str(file):
        return plain
    # With the driver's name, since MLflow makes the folders of a plain URI without decoding it.
    return URL.create("sqlite+pysqlite", database=str(file)).render_as_string()


def store_file(uri: str) -> Path | None:
    """Return the absolute path of the sqlite file behind a tracking URI; None for any other store.

    Raises:
        ConfigError: the URI cannot be read.
    """
    if uri.partition(":")[0].partition("+")[0] != "sqlite":
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(uri).database
    except ArgumentError:
        raise ConfigError(f"the tracking URI {uri} is not of the form sqlite:///FILE") from None
    # The others are sqlite's own: a store in memory, and its URIs.
    return None if not database or database.startswith((":memory:", "file:")) else Path(database).absolute()


def make_store(file: Path) -> None:
    """Make a missing sqlite store in one step, since MLflow cannot use one that is half made."""
    import mlflow

    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        made = store_uri(Path(folder, file.name))
        mlflow.MlflowClient(tracking_uri=made, registry_uri=made).search_experiments()
        # Where several processes make one at the same time, the first one's is kept.
        try:
            os.link(f"{folder}/{file.name}", file)
        except FileExistsError:
            pass
        except OSError:
            # The file system has no hard links.
            os.replace(f"{folder}/{file.name}", file)


@functools.cache
def check_store(file: Path, *, writes: bool) -> None:
    """Refuse a store that MLflow would fail at later or in words of its own; done once per process.

    One that another process has locked passes: MLflow waits for it.

    Args:
        file: the store.
        writes: whether it will be written.

    Raises:
        ConfigError: it is damaged, of another version of MLflow, or cannot be written.
    """
    if not file.is_file():
        raise ConfigError(f"the MLflow store {file} is not a file; move it away, or give another --tracking-uri")
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as store:
            (found,) = store.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise _damaged(file, " ".join(found.split()))
            _check_schema(store, file)
            if writes:
                _check_writable(store, file)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY:
            return
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"the MLflow store {file} is damaged ({reason}); restore it from a copy, or move it away, and the same command "
        "begins a new one: results lie in the run folders, not there"
    )


def _check_schema(store: sqlite3.Connection, file: Path) -> None:
    """Refuse a store whose tables are of another version of MLflow; one without tables passes, MLflow makes them."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
        return
    (found,) = store.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if found is None or found in scripts.get_heads():
        return
    try:
        scripts.get_revision(found)
    except CommandError:
        raise ConfigError(
            f"the MLflow store {file} was made by a later MLflow than the {mlflow.__version__} that is installed here; "
            "install that one, or give another --tracking-uri"
        ) from None
    raise ConfigError(
        f"the MLflow store {file} was made by an earlier MLflow than the {mlflow.__version__} that is installed here; "
        f"copy it, then run `mlflow db upgrade {shlex.quote(store_uri(file))}`, or give another --tracking-uri"
    )


def _check_writable(store: sqlite3.Connection, file: Path) -> None:
    """Refuse a store that cannot be written, by a change that is taken back."""
    try:
        store.execute("BEGIN IMMEDIATE")
        store.execute("CREATE TABLE probe (x)")
        store.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in _BUSY:
            raise
        raise ConfigError(
            f"the MLflow store {file} cannot be written ({error}); make it and its folder writable, or give another "
            "--tracking-uri"
        ) from None
