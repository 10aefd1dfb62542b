"""Who says how an MLflow run ended: a run of its own does, of a sweep's trial the sweep alone."""

from pathlib import Path

import mlflow
import pytest

from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.pipeline.context import Trial
from transfgu_ray.pipeline.run import _tracked
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder
from transfgu_ray.tracking.sweeps import begin_sweep, settle_trials


def test_tracked__a_trial_that_is_torn_leaves_its_status_to_the_sweep(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = build_config(get_preset("tiny_cpu"), None, [f"tracking.uri={uri}"])
    parent = begin_sweep(Folder(str(tmp_path / "sweep")), config, {"objective": "score"})
    trial = Trial(parent, {}, None, 1, lambda history: None, "training of a test")
    client, found = mlflow.MlflowClient(uri), {}

    def tear(name: str, of: Trial | None) -> None:
        with _tracked(Run.open(str(tmp_path / name), config), ["register"], of, print) as tracked:
            assert tracked is not None
            found[name] = tracked.run_id
            raise RuntimeError("torn")

    for name, of in (("trial", trial), ("run", None)):
        with pytest.raises(RuntimeError, match="torn"):
            tear(name, of)
    statuses = {name: client.get_run(run_id).info.status for name, run_id in found.items()}
    assert statuses == {"trial": "RUNNING", "run": "FAILED"}
    settle_trials(parent, [{"mlflow_run_id": found["trial"], "status": "stopped"}])
    assert client.get_run(found["trial"]).info.status == "KILLED"
