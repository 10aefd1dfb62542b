"""Logging, registration and download of finished models in MLflow's registry."""

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transfgu_ray.config.base import flatten
from transfgu_ray.errors import ArtifactError, foreign_words
from transfgu_ray.models.model import load_model_config
from transfgu_ray.reports.scores import scores_by_method
from transfgu_ray.runs.provenance import git_commit
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import NAMES
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.client import answering, connect, mlflow_at, patient, registry_uri
from transfgu_ray.tracking.requirements import requirements_of
from transfgu_ray.tracking.runs import Tracked, log_files

_MODEL_FILES = ("config.json", "encoder.safetensors", "backbone.safetensors", "decoder.safetensors", "names.yaml")

_NAMED = "names_sha256"
# Codes of errors of a server or store itself.
_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


@patient
def register(
    tracked: Tracked,
    run: Run,
    *,
    metrics: dict[str, Any],
    artifacts: list[str],
    more_tags: Mapping[str, str],
) -> dict[str, Any]:
    """Log scores and artifacts, log the model and register it once by its names; return name and version.

    Args:
        tracked: the MLflow run.
        run: run folder and configuration.
        metrics: content of metrics.json.
        artifacts: names in the run folder to keep with the MLflow run.
        more_tags: of the model, beside those that follow from the run.
    """
    import mlflow

    folder, config = run.folder, run.config
    client, uri = connect(tracked.uri)
    for name, value in flatten(scores_by_method(metrics)).items():
        # Lists, as of intervals, cannot be MLflow metrics; metrics.json, logged below, holds them.
        if isinstance(value, int | float):
            client.log_metric(tracked.run_id, name.replace(".", "/"), value)
    log_files(client, tracked.run_id, ((name, folder.read_bytes(name)) for name in artifacts))
    name = config.tracking.model_name
    # The same weights under other concept names are another model to its users.
    named = hashlib.sha256(folder.read_bytes(NAMES)).hexdigest() if folder.exists(NAMES) else None
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
            mlflow_at(uri),
            mlflow.start_run(run_id=tracked.run_id),
        ):
            version = _log_model(folder, Path(directory) / "model", name=name, run_id=tracked.run_id)
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
    for key, value in {**tags, **more_tags}.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_terminated(tracked.run_id, status="FINISHED")
    return {"model_name": name, "model_version": int(version), "tracking_uri": uri, "mlflow_run_id": tracked.run_id}


def fetch_model(model_uri: str, uri: str | None) -> str:
    """Return a local folder with the files of a registered model, e.g. `models:/transfgu@champion`.

    Raises:
        ArtifactError: the model does not exist, or MLflow failed.
    """
    import mlflow
    from requests import RequestException

    uri = registry_uri(uri)
    with answering(uri), mlflow_at(connect(uri, writes=False)[1]):
        try:
            return str(Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri)) / "artifacts" / "model")
        except (mlflow.exceptions.MlflowException, OSError) as error:
            # What does not answer may well have the model.
            if isinstance(error, RequestException) or getattr(error, "error_code", None) in _AWAY:
                raise
            raise ArtifactError(
                f"{model_uri} is not in the registry at {uri} ({foreign_words(error)}); see --tracking-uri"
            ) from None


def _log_model(run_folder: Folder, folder: Path, *, name: str, run_id: str) -> str:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    code = Path(__file__).with_name("pyfunc.py")
    folder.mkdir()
    model = Folder(run_folder.uri_of("model"))
    for file in filter(model.exists, _MODEL_FILES):
        (folder / file).write_bytes(model.read_bytes(file))
    depth = np.uint8 if len(load_model_config(model).kinds) <= 256 else np.uint16
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3), name=None)]),
        outputs=Schema([TensorSpec(np.dtype(depth), (-1, -1, -1))]),
    )
    info = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(code),
        artifacts={"model": str(folder)},
        code_paths=[str(code.parents[1])],
        signature=signature,
        pip_requirements=requirements_of(code),
    )
    client = mlflow.MlflowClient()
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        # Raised if the name exists already.
        client.create_registered_model(name)
    return str(client.create_model_version(name, info.model_uri, run_id=run_id, model_id=info.model_id).version)
