"""MLflow: one run per `transfgu run`, its losses, scores and pictures, and a registered model."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfgu_ray.config.base import flatten
from transfgu_ray.config.run import RunConfig
from transfgu_ray.errors import ConfigError
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.client import SQLITE, answering, connect, has_run, tracking_uri

RECORD = "mlflow.json"
_NOT_TERMS = ("epoch",)
# MLflow takes no more at a time.
_PARAMS_A_CALL = 100
# The tag that MLflow's own page nests runs by.
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class Tracked:
    """An MLflow run.

    Attributes:
        uri: tracking URI.
        run_id: MLflow's id of the run.
    """

    uri: str
    run_id: str


def begin(run: Folder, config: RunConfig, parent: Tracked | None = None) -> Tracked:
    """The MLflow run of a run folder: the one it had, or a new one when the configuration changed.

    Args:
        run: the run folder.
        config: its configuration.
        parent: of a trial.
    """
    identity = config.model_dump(mode="json", exclude={"tracking", "runtime"})
    with answering(tracking_uri(run, config)):
        return open_run(run, config, identity=identity, tags={} if parent is None else {PARENT: parent.run_id})


def open_run(folder: Folder, config: RunConfig, *, identity: dict[str, Any], tags: Mapping[str, str]) -> Tracked:
    """The MLflow run of a folder: the one it had, or a new one when what it is made of changed.

    Args:
        folder: keeps the id.
        config: says where it is tracked.
        identity: what the folder is made of; its parameters.
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
        location = (
            f"file://{Path(uri.removeprefix(SQLITE)).parent / 'mlartifacts'}" if uri.startswith("sqlite:") else None
        )
        # Without it MLflow's page opens on traces of language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        experiment_id = client.create_experiment(config.tracking.experiment, location, kind)
    else:
        experiment_id = experiment.experiment_id
    name = folder.uri.rstrip("/").rpartition("/")[2]
    run_id = client.create_run(experiment_id, run_name=name, tags={"run_folder": folder.uri, **tags}).info.run_id
    # At once, so that a kill leaves no run that its folder does not know.
    record = {"uri": uri, "run_id": run_id, "config": identity}
    folder.write_json(RECORD, record)
    log_params(client, run_id, identity)
    return Tracked(uri, run_id)


def log_params(client: Any, run_id: str, values: dict[str, Any]) -> None:
    """Logs parameters of a run; those that it has are left as they are."""
    from mlflow.entities import Param

    # MLflow takes no commas in names.
    params = [Param(key.replace(", ", " and "), str(value)) for key, value in flatten(values).items()]
    for start in range(0, len(params), _PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_CALL])


def log_files(client: Any, run_id: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Keeps files with a run, by their names, which may hold folders."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in files:
            copy = Path(directory, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
        client.log_artifacts(run_id, directory)


def log_epochs(tracked: Tracked, history: list[dict[str, float]]) -> None:
    """Logs the losses of the epochs that the run does not have yet, so that a resumed epoch is there once."""
    client, _ = connect(tracked.uri)
    known = {metric.step for metric in client.get_metric_history(tracked.run_id, "train/loss")}
    for epoch in history:
        if epoch["epoch"] not in known:
            for name, value in epoch.items():
                if name not in _NOT_TERMS:
                    client.log_metric(tracked.run_id, f"train/{name}", value, step=int(epoch["epoch"]))


@contextlib.contextmanager
def ended_on_error(tracked: Tracked) -> Iterator[None]:
    """Closes the MLflow run as FAILED, or as KILLED by Ctrl-C or SIGTERM, when what follows raises.

    Raises:
        ArtifactError: MLflow itself failed.
    """
    from mlflow.exceptions import MlflowException

    try:
        with answering(tracked.uri):
            yield
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        # What the error is about may be what MLflow needs too: a full disk, a network.
        with contextlib.suppress(MlflowException, ConfigError):
            connect(tracked.uri)[0].set_terminated(tracked.run_id, status=status)
        raise
