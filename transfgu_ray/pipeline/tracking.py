"""MLflow: one run per `transfgu run`, its losses, scores and pictures, and a registered model."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfgu_ray.artifacts import NAMES, git_commit
from transfgu_ray.config import RunConfig, flatten
from transfgu_ray.credentials import refuse_credentials
from transfgu_ray.errors import ArtifactError, ConfigError
from transfgu_ray.model import load_model_config
from transfgu_ray.pipeline.session import kept_environment
from transfgu_ray.scores import scores_by_method
from transfgu_ray.storage import Folder

RECORD = "mlflow.json"
_MODEL_FILES = ("config.json", "encoder.safetensors", "backbone.safetensors", "decoder.safetensors", "names.yaml")
_NOT_TERMS = ("epoch",)
_SQLITE = "sqlite:///"
_NAMED = "names_sha256"
_SERVER = "MLFLOW_TRACKING_URI"
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


def tracking_uri(run: Folder, config: RunConfig) -> str:
    """The configured URI, else $MLFLOW_TRACKING_URI, else a sqlite store beside a local run folder.

    Raises:
        ConfigError: the run folder is remote and no URI is given, or the URI holds a password.
    """
    configured = config.tracking.uri or os.environ.get(_SERVER)
    if configured:
        refuse_credentials("the tracking URI", configured)
        return configured
    if "://" in run.uri:
        raise ConfigError(
            "a run folder at a URI needs a tracking server: set --tracking-uri, tracking.uri or MLFLOW_TRACKING_URI"
        )
    return f"{_SQLITE}{Path(run.uri).parent / 'mlflow.db'}"


def begin(run: Folder, config: RunConfig, parent: Tracked | None = None) -> Tracked:
    """The MLflow run of a run folder: the one it had, or a new one when the configuration changed.

    Args:
        run: the run folder.
        config: its configuration.
        parent: of a trial.
    """
    identity = config.model_dump(mode="json", exclude={"tracking", "runtime"})
    with _answering(tracking_uri(run, config)):
        return open_run(run, config, identity, {} if parent is None else {PARENT: parent.run_id})


def open_run(folder: Folder, config: RunConfig, identity: dict[str, Any], tags: Mapping[str, str]) -> Tracked:
    """The MLflow run of a folder: the one it had, or a new one when what it is made of changed.

    Args:
        folder: keeps the id.
        config: says where it is tracked.
        identity: what the folder is made of; its parameters.
        tags: of a new run.
    """
    client, uri = connect(tracking_uri(folder, config))
    record = folder.read_json(RECORD) or {}
    if record.get("uri") == uri and record.get("config") == identity and _has_run(client, record["run_id"]):
        client.update_run(record["run_id"], status="RUNNING")
        log_params(client, record["run_id"], identity)
        return Tracked(uri, record["run_id"])
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        location = (
            f"file://{Path(uri.removeprefix(_SQLITE)).parent / 'mlartifacts'}" if uri.startswith("sqlite:") else None
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
    folder.write_bytes(RECORD, json.dumps(record, indent=1).encode())
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


def register(
    tracked: Tracked,
    run: Folder,
    config: RunConfig,
    metrics: dict[str, Any],
    artifacts: list[str],
    more_tags: Mapping[str, str],
) -> dict[str, Any]:
    """Logs scores and artifacts, logs the model and registers it once by its names; returns name and version.

    Args:
        tracked: the MLflow run.
        run: the run folder.
        config: its configuration.
        metrics: content of metrics.json.
        artifacts: names in the run folder to keep with the MLflow run.
        more_tags: of the model beside those that follow from the run.
    """
    import mlflow

    client, uri = connect(tracked.uri)
    for name, value in flatten(scores_by_method(metrics)).items():
        # An interval is a list, which MLflow has no metric for; metrics.json, kept below, holds it.
        if isinstance(value, float):
            client.log_metric(tracked.run_id, name.replace(".", "/"), value)
    log_files(client, tracked.run_id, ((name, run.read_bytes(name)) for name in artifacts))
    name = config.tracking.model_name
    # The same weights under other names are another model to whoever uses it.
    named = hashlib.sha256(run.read_bytes(NAMES)).hexdigest() if run.exists(NAMES) else None
    versions = [
        v
        for v in client.search_model_versions(f"name='{name}'")
        if v.run_id == tracked.run_id and v.tags.get(_NAMED) == named
    ]
    if versions:
        version = versions[0].version
    else:
        with (
            tempfile.TemporaryDirectory() as directory,
            _mlflow_at(uri),
            mlflow.start_run(run_id=tracked.run_id),
        ):
            version = _log_model(run, Path(directory) / "model", name, tracked.run_id)
    tags = {
        "recipe": config.preset,
        "num_concepts": str(config.num_concepts),
        "dataset": config.data.dataset,
        "weights_sha256": metrics["weights_sha256"],
    }
    commit = git_commit()
    if commit is not None:
        tags["git_commit"] = commit
    if named is not None:
        tags[_NAMED] = named
    if metrics["stages"]:
        tags["miou"] = f"{metrics['stages']['bootstrapped']['miou']:.6f}"
    for key, value in (tags | more_tags).items():
        client.set_model_version_tag(name, version, key, value)
    client.set_terminated(tracked.run_id, status="FINISHED")
    return {"model_name": name, "model_version": int(version), "tracking_uri": uri, "mlflow_run_id": tracked.run_id}


@contextlib.contextmanager
def _mlflow_at(uri: str) -> Iterator[None]:
    """MLflow's functions that take no client, at a server and its registry.

    MLflow enters the server into the environment, where the next run of this process would take it for the user's.
    """
    import mlflow

    with kept_environment(_SERVER, "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)
            mlflow.set_registry_uri(None)


@contextlib.contextmanager
def ended_on_error(tracked: Tracked) -> Iterator[None]:
    """Closes the MLflow run as FAILED, or as KILLED by Ctrl-C or SIGTERM, when what follows raises.

    Raises:
        ArtifactError: MLflow itself failed.
    """
    from mlflow.exceptions import MlflowException

    try:
        with _answering(tracked.uri):
            yield
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        # What the error is about may be what MLflow needs too: a full disk, a network.
        with contextlib.suppress(MlflowException, ConfigError):
            connect(tracked.uri)[0].set_terminated(tracked.run_id, status=status)
        raise


@contextlib.contextmanager
def _answering(uri: str) -> Iterator[None]:
    """Tells in a sentence of a tracking server or store that fails."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"MLflow at {uri} failed: {reason}; the same command goes on from here") from None


def registry_uri(uri: str | None) -> str:
    """The given URI, else $MLFLOW_TRACKING_URI, else a sqlite store in the working directory.

    Raises:
        ConfigError: it holds a password.
    """
    found = uri or os.environ.get(_SERVER) or f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"
    refuse_credentials("the tracking URI", found)
    return found


def fetch_model(model_uri: str, uri: str | None) -> str:
    """Local folder with the files of a registered model, e.g. `models:/transfgu@champion`.

    Raises:
        ArtifactError: there is no such model.
    """
    import mlflow

    _, uri = connect(registry_uri(uri))
    try:
        with _mlflow_at(uri):
            return str(Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri)) / "artifacts" / "model")
    except (mlflow.exceptions.MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{model_uri} is not in the registry at {uri} ({reason}); see --tracking-uri") from None


def _log_model(run: Folder, folder: Path, name: str, run_id: str) -> str:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    import transfgu_ray

    package = Path(transfgu_ray.__file__).parent
    folder.mkdir()
    model = Folder(run.uri_of("model"))
    for file in filter(model.exists, _MODEL_FILES):
        (folder / file).write_bytes(model.read_bytes(file))
    depth = np.uint8 if len(load_model_config(model).kinds) <= 256 else np.uint16
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3), name=None)]),
        outputs=Schema([TensorSpec(np.dtype(depth), (-1, -1, -1))]),
    )
    info = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(package / "pyfunc_model.py"),
        artifacts={"model": str(folder)},
        code_paths=[str(package)],
        signature=signature,
        pip_requirements=[
            "torch",
            "timm",
            "safetensors",
            "numpy",
            "pillow",
            "pyarrow",
            "fsspec",
            "jaxtyping",
            "faiss-cpu",
            "scipy",
            "torchvision",
            "huggingface-hub",
            "pydantic",
            "pyyaml",
        ],
    )
    client = mlflow.MlflowClient()
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        # Raised where the name is known already.
        client.create_registered_model(name)
    return str(client.create_model_version(name, info.model_uri, run_id=run_id, model_id=info.model_id).version)


def _has_run(client: Any, run_id: str) -> bool:
    import mlflow

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.exceptions.MlflowException:
        return False


def connect(uri: str) -> tuple[Any, str]:
    """A client of a tracking server and registry, and the URI.

    Raises:
        ConfigError: it cannot be used.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for noisy in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from sqlalchemy.exc import OperationalError

    try:
        if uri.startswith(_SQLITE):
            _make_store(Path(uri.removeprefix(_SQLITE)))
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri), uri
    except (mlflow.exceptions.MlflowException, OperationalError, OSError) as error:
        raise ConfigError(f"the tracking URI {uri} cannot be used: {str(error).splitlines()[0]}") from None


def _make_store(file: Path) -> None:
    """Makes a sqlite store that is not there yet, whole or not at all: MLflow can never use one that is half made."""
    import mlflow

    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        made = f"{_SQLITE}{folder}/{file.name}"
        mlflow.MlflowClient(tracking_uri=made, registry_uri=made).search_experiments()
        # Of several that make one at the same time, the first has it.
        try:
            os.link(f"{folder}/{file.name}", file)
        except FileExistsError:
            pass
        except OSError:
            # File systems without second names.
            os.replace(f"{folder}/{file.name}", file)
