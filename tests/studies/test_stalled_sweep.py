"""A sweep whose trial hangs: it ends in time, with the right exit code, and names the trial."""

import json
import os
import re
import signal
import time
from pathlib import Path

import mlflow
import pytest
import yaml

from tests.fixtures import training_workers, transfgu
from tests.studies.test_tune import tiny_base
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, random_vit
from transfgu_ray.config.presets import get_preset

_STALL_MIN = 1.5


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("objective", ["miou", "score"])
def test_tune__a_trial_that_hangs_ends_the_sweep_which_names_it(tmp_path: Path, objective: str) -> None:
    weights, overrides = (
        tmp_path / "encoder.safetensors",
        {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8},
    )
    name = get_preset("tiny_cpu").encoder.name
    weights.write_bytes(dump_encoder(random_vit(name, overrides, 0), name, overrides=overrides))
    config, space, sweep = tmp_path / "config.yaml", tmp_path / "space.yaml", tmp_path / "sweep"
    config.write_text(yaml.safe_dump(tiny_base(tmp_path / "data", str(weights)).model_dump(mode="json")))
    space.write_text("train.omega_1: [0.5]")
    command = ["tune", str(sweep), "--space", str(space), "--sampler", "grid", "--objective", objective]
    command += ["--preset", "tiny_cpu", "--config", str(config)]
    # So many epochs that it is frozen before it ends.
    long = ["--set", "train.round_epochs=[5000]", "--set", f"runtime.stall_minutes={_STALL_MIN}"]
    process = transfgu(*command, *long, env={"MARK_OF_TEST": str(tmp_path)})
    while not list(sweep.glob("trials/*/train/history.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    frozen = training_workers(f"MARK_OF_TEST={tmp_path}")
    assert frozen
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    said, _ = process.communicate(timeout=600)
    assert time.monotonic() - began < 60 * (_STALL_MIN + 1)
    assert process.returncode == 1, said
    (trial,) = json.loads((sweep / "sweep.json").read_bytes())["trials"]
    words = rf"trial {trial['id']} did nothing for 1\.5 minutes, so the sweep was stopped; .*; 0 trials had ended"
    assert re.search(words, " ".join(said.split())), said
    assert "Traceback" not in said
    assert trial["status"] == "failed"
    assert f"trial {trial['id']} did nothing" in trial["error"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("transfgu").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED"] * 2
