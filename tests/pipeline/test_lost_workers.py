"""Trainings that lose workers more often than a constant would allow, and trainings on fewer workers than asked for."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.cluster import cluster
from tests.fixtures import training_workers, transfgu
from transfgu_ray.runs.run import Run

_LOSSES = 4


def epochs_of(folder: Path) -> int:
    """Return the number of epochs that a training has reported."""
    history = folder / "train/history.json"
    return len(json.loads(history.read_text())) if history.exists() else 0


def wait(process: subprocess.Popen[str], folder: Path, epochs: int) -> None:
    while epochs_of(folder) < epochs:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.ray
def test_train__goes_on_however_often_its_worker_is_lost(labelled: Run, tmp_path: Path) -> None:
    setting = ("--set", "train.round_epochs=[6, 6]", "--overwrite", "--quiet")
    quiet, folder = (shutil.copytree(labelled.folder.path, tmp_path / name) for name in ("quiet", "lossy"))
    assert transfgu("train", str(quiet), *setting).wait(timeout=600) == 0
    process = transfgu("train", str(folder), *setting, env={"MARK_OF_TEST": str(tmp_path)})
    for loss in range(_LOSSES):
        wait(process, folder, 2 * loss + 1)
        (pid,) = training_workers(f"MARK_OF_TEST={tmp_path}")
        os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    models = [(each / "model/decoder.safetensors").read_bytes() for each in (quiet, folder)]
    assert models[0] == models[1]
    assert [row["epoch"] for row in json.loads((folder / "train/history.json").read_text())] == list(range(12))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(("fewest", "code"), [("1", 0), ("null", 1)], ids=["elastic", "all"])
def test_train__on_fewer_workers_only_where_the_user_allows_it(
    labelled: Run, tmp_path: Path, fewest: str, code: int
) -> None:
    folder = shutil.copytree(labelled.folder.path, tmp_path / "run")
    settings = [f"runtime.min_train_workers={fewest}", "runtime.train_workers=2", "runtime.stall_minutes=1.5"]
    with cluster(num_nodes=1) as one:
        process = transfgu(
            "train",
            str(folder),
            "--ray-address",
            one.address,
            *(part for setting in settings for part in ("--set", setting)),
            env=one.environment,
        )
        said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    if code:
        assert "stage train did nothing for 1.5 minutes and was stopped" in " ".join(said.split())
    else:
        assert json.loads((folder / "train.json").read_text())["epochs"] == 2
