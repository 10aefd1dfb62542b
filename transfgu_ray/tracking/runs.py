"""MLflow runs: one per run folder, with its parameters, losses and files."""

import contextlib
import functools
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfgu_ray.config.base import flatten
from transfgu_ray.config.run import NOT_RESULT, RunConfig
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.client import answering, connect, has_run, hasty, patient, tracking_uri
from transfgu_ray.tracking.local_store import store_file

RECORD = "mlflow.json"
_NOT_TERMS = ("epoch",)
# MLflow's limit.
_PARAMS_PER_CALL = 100
# The tag by which MLflow's pages nest runs.
PARENT = "mlflow.parentRunId"
History = list[dict[str, float]]
# Of a request that nothing waits for, between two attempts, and for the last attempts.
_REQUEST_SECONDS, _AGAIN_SECONDS, _LAST_SECONDS = 10, 5.0, 15.0
_LOGGER = logging.getLogger("transfgu_ray")


@dataclass(frozen=True)
class Tracked:
    """An MLflow run.

    Attributes:
        uri: tracking URI.
        run_id: MLflow's id of the run.
    """

    uri: str
    run_id: str


def begin(run_folder: Folder, config: RunConfig, parent: Tracked | None = None) -> Tracked:
    """Continue the MLflow run of a run folder, or begin a new one if the configuration changed.

    Args:
        run_folder: the run folder.
        config: its configuration.
        parent: run of the sweep, for a trial.
    """
    identity = config.model_dump(mode="json", exclude=NOT_RESULT)
    with answering(tracking_uri(run_folder, config)):
        return open_run(run_folder, config, identity=identity, tags={} if parent is None else {PARENT: parent.run_id})


@patient
def open_run(folder: Folder, config: RunConfig, *, identity: dict[str, Any], tags: Mapping[str, str]) -> Tracked:
    """Continue the MLflow run of a folder, or begin a new one if its identity changed.

    Args:
        folder: stores the id of the run.
        config: holds the tracking settings.
        identity: everything that defines the folder, logged as parameters.
        tags: of a new run.
    """
    client, uri = connect(tracking_uri(folder, config))
    record = folder.read_json(RECORD) or {}
    if record.get("uri") == uri and record.get("config") == identity and has_run(client, record["run_id"]):
        client.update_run(record["run_id"], status="RUNNING")
        log_params(client, record["run_id"], identity)
        return Tracked(uri, record["run_id"])
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        file = store_file(uri)
        location = None if file is None else (file.parent / "mlartifacts").as_uri()
        # Without it MLflow's page opens on traces of language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        experiment_id = client.create_experiment(config.tracking.experiment, location, kind)
    else:
        experiment_id = experiment.experiment_id
    name = folder.uri.rstrip("/").rpartition("/")[2]
    run_id = client.create_run(experiment_id, run_name=name, tags={"run_folder": folder.uri, **tags}).info.run_id
    # At once, so that a kill leaves no run unknown to its folder.
    record = {"uri": uri, "run_id": run_id, "config": identity}
    folder.write_json(RECORD, record)
    log_params(client, run_id, identity)
    return Tracked(uri, run_id)


def log_params(client: Any, run_id: str, values: dict[str, Any]) -> None:
    """Log parameters of a run; those that it has already are unchanged."""
    from mlflow.entities import Param

    # MLflow allows no commas in names.
    params = [Param(key.replace(", ", " and "), str(value)) for key, value in flatten(values).items()]
    for start in range(0, len(params), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])


def log_files(client: Any, run_id: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Log files with a run by their names, which may contain folders."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in files:
            copy = Path(directory, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
        client.log_artifacts(run_id, directory)


def log_epochs(tracked: Tracked, history: History) -> None:
    """Log the losses of the epochs that the run does not have yet, so that each appears once after a restart."""
    from mlflow.entities import Metric

    client, _ = connect(tracked.uri)
    known = {metric.step for metric in client.get_metric_history(tracked.run_id, "train/loss")}
    for epoch in history:
        step = int(epoch["epoch"])
        if step not in known:
            at = _met_at(tracked.run_id, step)
            terms = {name: value for name, value in epoch.items() if name not in _NOT_TERMS}
            # In one request, so that no epoch is known of which half is missing.
            metrics = [Metric(f"train/{name}", value, at, step) for name, value in terms.items()]
            client.log_batch(tracked.run_id, metrics=metrics)


@functools.cache
def _met_at(run_id: str, step: int) -> int:
    """Return when this process first met an epoch of a run, in ms: only metrics of one time are the same to MLflow.

    A server may obey a request long after its sender gave it up and sent another.
    """
    return int(time.time() * 1000)


@contextlib.contextmanager
def epochs_logged(tracked: Tracked | None) -> Iterator[Callable[[History], None]]:
    """Yield a function that takes the history so far and returns at once; a thread of its own logs the epochs.

    Failures of MLflow are noted in the log and tried again. When the context ends, the thread gets some seconds more;
    what is missing then, `log_epochs` must log later.

    Args:
        tracked: the MLflow run; None logs nothing.
    """
    if tracked is None:
        yield lambda history: None
        return
    newest: History = []
    is_new, is_over, is_given_up = threading.Event(), threading.Event(), threading.Event()

    def take(history: History) -> None:
        nonlocal newest
        newest = list(history)
        is_new.set()

    def work() -> None:
        is_behind = False
        while not is_given_up.is_set():
            is_new.wait(_AGAIN_SECONDS if is_behind else None)
            is_new.clear()
            is_behind = not _try_to_log(tracked, newest, failed_before=is_behind)
            if is_over.is_set() and not is_behind and not is_new.is_set():
                break

    thread = threading.Thread(target=work, daemon=True, name="log epochs")
    with hasty(_REQUEST_SECONDS):
        thread.start()
        try:
            yield take
        finally:
            is_over.set()
            is_new.set()
            thread.join(_LAST_SECONDS)
            is_given_up.set()


def _try_to_log(tracked: Tracked, history: History, *, failed_before: bool) -> bool:
    """Log the missing epochs; return whether that succeeded, and note in the log where this has changed."""
    try:
        if history:
            log_epochs(tracked, history)
    except Exception as error:  # noqa: BLE001  # of MLflow, the libraries below it or the network; training goes on
        if not failed_before:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            _LOGGER.warning("MLflow at %s failed and gets its epochs later: %s", tracked.uri, reason)
        return False
    if failed_before:
        _LOGGER.info("MLflow at %s has all %d epochs again", tracked.uri, len(history))
    return True


@contextlib.contextmanager
def ended_on_error(tracked: Tracked) -> Iterator[None]:
    """Close the MLflow run if the body raises: as KILLED after Ctrl-C or SIGTERM, else as FAILED.

    Raises:
        ArtifactError: MLflow itself failed.
    """
    try:
        with answering(tracked.uri):
            yield
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        # The cause, such as a full disk or a lost network, may affect MLflow too, and it must not hold up the end.
        with contextlib.suppress(Exception), hasty(_REQUEST_SECONDS):
            connect(tracked.uri)[0].set_terminated(tracked.run_id, status=status)
        raise
