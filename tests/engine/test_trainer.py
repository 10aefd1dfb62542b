"""Trainings under Ray Train: damaged records of checkpoints, and Ctrl-C."""

import io
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.fixtures import transfgu
from transfgu_ray.engine.signs import Board
from transfgu_ray.engine.trainer import _failure, has_lost_workers, recover_torn, watched_json
from transfgu_ray.errors import CredentialsError, DataError, StorageError
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder

NAME = "train/rounds-1"
RECORD = f"{NAME}/checkpoint_manager_snapshot.json"


def checkpoint(run: Folder, name: str, position: list[int]) -> None:
    content = io.BytesIO()
    torch.save({"position": position, "weights": torch.ones(3)}, content)
    run.write_bytes(f"{NAME}/{name}/state.pt", content.getvalue())


@pytest.mark.parametrize(
    "record", [b'{"checkpoint_0', b"", b'{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_9"}]}', b"[]"]
)
def test_recover_torn__goes_on_from_the_furthest_whole_checkpoint(tmp_path: Path, record: bytes) -> None:
    run = Folder(str(tmp_path))
    # Named as by a clock that was set back.
    checkpoint(run, "checkpoint_2", [3, 10])
    checkpoint(run, "checkpoint_1", [4, 0])
    whole = run.read_bytes(f"{NAME}/checkpoint_2/state.pt")
    for torn in (b"", whole[:100], whole[: len(whole) // 2], b"PK" + whole[5:]):
        run.write_bytes(f"{NAME}/checkpoint_3/state.pt", torn)
        run.write_bytes(RECORD, record)
        assert recover_torn(run, NAME) == run.uri_of(f"{NAME}/checkpoint_1")
        assert not run.exists(RECORD)
    assert run.exists(f"{NAME}/checkpoint_2/state.pt"), "a checkpoint was thrown away"


def test_recover_torn__leaves_a_whole_training_alone(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    assert recover_torn(run, NAME) is None
    checkpoint(run, "checkpoint_0", [1, 0])
    record = b'{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_0"}]}'
    run.write_bytes(RECORD, record)
    assert recover_torn(run, NAME) is None
    assert run.read_bytes(RECORD) == record


def test_recover_torn__without_a_whole_checkpoint_starts_afresh(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    run.write_bytes(RECORD, b"{")
    run.write_bytes(f"{NAME}/checkpoint_0/state.pt", b"weights")
    assert recover_torn(run, NAME) is None
    assert not run.exists(RECORD)


@pytest.mark.parametrize(
    ("errors", "finals"),
    [
        # Data, settings and credentials: at once. A storage that is away: never.
        ([(DataError("a"), (0, 0))], [True]),
        ([(StorageError("a"), (0, 0))] * 5, [False] * 5),
        ([(CredentialsError("a"), (0, 0))], [True]),
        # A loss that is not finite: the second time, wherever.
        ([(FloatingPointError("in epoch 0"), (0, 3)), (FloatingPointError("in epoch 5"), (5, 1))], [False, True]),
        # Anything else: the third time in a row at the same step.
        ([(RuntimeError("a"), (0, 3))] * 3, [False, False, True]),
        ([(RuntimeError("a"), (0, 3)), (RuntimeError("a"), (0, 4))] * 2, [False] * 4),
        ([(RuntimeError(f"peer {port} closed"), (0, 3)) for port in range(4)], [False] * 4),
        ([(torch.OutOfMemoryError(f"process {pid}"), (0, 3)) for pid in range(3)], [False, False, True]),
    ],
)
def test_failure__is_final_when_another_start_would_only_repeat_it(
    errors: list[tuple[Exception, tuple[int, int]]], finals: list[bool]
) -> None:
    board, found = Board(), []
    for error, position in errors:
        board.fail("training", 0, _failure(error, position))
        # That of another worker, which fails whenever the first does.
        board.fail("training", 1, _failure(RuntimeError(f"closed by peer {len(found)}"), position))
        found.append(board.final_failure("training") is not None)
    assert found == finals
    assert board.final_failure("another") is None


def test_failure__of_two_workers_in_one_start_counts_once() -> None:
    board = Board()
    for rank in range(2):
        board.fail("training", rank, _failure(FloatingPointError("the loss is nan"), (0, 3)))
    assert board.final_failure("training") is None
    board.fail("training", 1, _failure(FloatingPointError("the loss is nan"), (0, 3)))
    assert board.final_failure("training").times == 2


def test_has_lost_workers() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    of_data = RayTaskError("read", "traceback", DataError("gone")).as_instanceof_cause()
    assert not has_lost_workers(WorkerGroupError("words", {0: DataError("a"), 1: of_data}))
    assert has_lost_workers(WorkerGroupError("words", {0: RuntimeError("peer"), 1: ActorDiedError()}))
    assert has_lost_workers(ControllerError(RuntimeError("no room")))
    assert not has_lost_workers(RuntimeError("a bug"))


def test_watched_json__goes_on_after_an_error_and_passes_the_content_on_again(tmp_path: Path) -> None:
    folder, seen = Folder(str(tmp_path)), []

    def fail_once(content: object) -> None:
        seen.append(content)
        if len(seen) == 1:
            raise RuntimeError("MLflow is away")

    with watched_json(folder, "history.json", fail_once):
        folder.write_json("history.json", [1])
        end = time.monotonic() + 30
        while len(seen) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        folder.write_json("history.json", [1, 2])
    assert seen == [[1], [1], [1, 2]]


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
