"""Trainings under Ray Train: damaged records of checkpoints, and Ctrl-C."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.fixtures import transfgu
from transfgu_ray.engine.trainer import drop_torn
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (b'{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_0"}]}', True),
        (b'{"checkpoint_0', False),
        (b"", False),
    ],
)
def test_drop_torn__only_a_damaged_one(tmp_path, record: bytes, kept: bool) -> None:
    run = Folder(str(tmp_path))
    run.write_bytes("train/rounds-1/checkpoint_manager_snapshot.json", record)
    run.write_bytes("train/rounds-1/checkpoint_0/state.pt", b"weights")
    drop_torn(run, "train/rounds-1")
    assert run.exists("train/rounds-1/checkpoint_0/state.pt") is kept
    drop_torn(run, "train/rounds-2")


@pytest.mark.slow
@pytest.mark.ray
def test_train__ctrl_c_says_that_it_was_stopped(labelled: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(labelled.folder.path, tmp_path / "run")
    process = transfgu("train", str(folder), "--set", "train.round_epochs=[1, 200]", "--overwrite")
    while process.poll() is None and not (folder / "train/history.json").exists():
        time.sleep(0.1)
    # To the command alone: Ray's own handler would wait for the workers and exit with 0.
    os.kill(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, printed
    assert "transfgu: stopped; the same command goes on from here" in printed
