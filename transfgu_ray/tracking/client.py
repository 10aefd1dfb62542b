"""Connections to MLflow: tracking server, sqlite store and registry."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.environment import kept_environment
from transfgu_ray.errors import ArtifactError, ConfigError, foreign_words
from transfgu_ray.storage import Folder, refuse_credentials
from transfgu_ray.tracking.local_store import check_store, make_store, store_file, store_uri

_SERVER = "MLFLOW_TRACKING_URI"
_RETRIES, _TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
# MLflow repeats requests to a server for four minutes, but waits only 20 s for a store that another process has locked.
_PATIENCE_SECONDS, _PAUSE_SECONDS = 120.0, 2.0
_P = ParamSpec("_P")
_R = TypeVar("_R")


def tracking_uri(run_folder: Folder, config: RunConfig) -> str:
    """Return the configured URI, else $MLFLOW_TRACKING_URI, else that of a sqlite store beside a local run folder.

    Raises:
        ConfigError: the run folder is remote and no URI is given, or the URI holds a password.
    """
    configured = config.tracking.uri or os.environ.get(_SERVER)
    if configured:
        refuse_credentials("the tracking URI", configured)
        return configured
    if "://" in run_folder.uri:
        raise ConfigError(
            "a run folder at a URI needs a tracking server: set --tracking-uri, tracking.uri or MLFLOW_TRACKING_URI"
        )
    return store_uri(Path(run_folder.uri).parent / "mlflow.db")


@contextlib.contextmanager
def mlflow_at(uri: str) -> Iterator[None]:
    """Set server and registry for MLflow's functions that take no client.

    The environment is restored: MLflow writes the server to it, and the next run would take it for the user's choice.
    """
    import mlflow

    with kept_environment(_SERVER, "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # None, which resets it, is not annotated
            mlflow.set_registry_uri(None)  # type: ignore[arg-type]  # likewise


def patient(action: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return an action that is repeated for two minutes while the store is busy or away; repeating it must be safe."""

    @functools.wraps(action)
    def repeated(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        from mlflow.exceptions import MlflowException

        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return action(*args, **kwargs)
            except MlflowException as error:
                if error.error_code != "TEMPORARILY_UNAVAILABLE" or time.monotonic() > until:
                    raise
            time.sleep(_PAUSE_SECONDS)

    return repeated


@contextlib.contextmanager
def hasty(seconds: int) -> Iterator[None]:
    """Let requests to a server fail after some seconds in this context, in all threads, instead of after minutes."""
    with kept_environment(_RETRIES, _TIMEOUT):
        os.environ |= {_RETRIES: "0", _TIMEOUT: str(seconds)}
        yield


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Raise an ArtifactError of one sentence where a tracking server or store fails."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    # The others where a server refuses a file, and where a store is damaged meanwhile.
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        raise ArtifactError(
            f"MLflow at {uri} failed: {foreign_words(error)}; the same command continues from here"
        ) from None


def registry_uri(uri: str | None) -> str:
    """Return the given URI, else $MLFLOW_TRACKING_URI, else that of a sqlite store in the working directory.

    Raises:
        ConfigError: it holds a password.
    """
    found = uri or os.environ.get(_SERVER) or store_uri(Path.cwd() / "mlflow.db")
    refuse_credentials("the tracking URI", found)
    return found


def has_run(client: Any, run_id: str) -> bool:
    """Return whether the server has this run and it is not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        # A server that does not answer may well have it.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def connect(uri: str, *, writes: bool = True) -> tuple[Any, str]:
    """Return a client of a tracking server and registry, and the URI.

    Args:
        uri: tracking URI.
        writes: whether something will be written there.

    Raises:
        ConfigError: it cannot be used.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # It prints the traceback of every failure that it raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if (file := store_file(uri)) is not None:
            make_store(file)
            check_store(file, writes=writes)
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri), uri
    except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError) as error:
        raise ConfigError(f"the tracking URI {uri} cannot be used: {foreign_words(error)}") from None
