"""SIGTERM and Ctrl-C while the real command does this or that: the closing line, the exit code, and going on."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders import make_folder, make_voc
from tests.fixtures import TINY, transfgu
from tests.pretraining.test_pretrain import TINY as PRETRAIN_TINY
from transfgu_ray.runs.run import Run

# Less than the half minute that schedulers leave between SIGTERM and SIGKILL.
_LIMIT_S = 20
_LAST = "transfgu: stopped; the same command goes on from here"


def _set(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


_SETTINGS = _set(*TINY, "train.round_epochs=[40]")
_TUNE = ["--preset", "tiny_cpu", "--dataset", "voc", "--objective", "miou", *_set(*TINY, "train.round_epochs=[5000]")]
_PRETRAIN = _set(*PRETRAIN_TINY, "schedule.epochs=5000", "schedule.batch_size=4")


class Command:
    """A command whose output is read as it comes."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.lines: list[str] = []
        self.process = transfgu(*arguments, cwd=cwd)
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reader.start()

    def reach(self, moment: Callable[["Command"], bool]) -> None:
        """Wait for a moment."""
        while not moment(self):
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)

    def stop(self, *, by: int, times: int = 1) -> str:
        """Send a signal and return what was printed, once the process has ended in time, by that signal's code."""
        try:
            sent = time.monotonic()
            for _ in range(times):
                self.process.send_signal(by)
                time.sleep(0.3)
            self.process.wait(_LIMIT_S)
            took = time.monotonic() - sent
        finally:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        output = "".join(self.lines)
        assert took < _LIMIT_S
        assert self.process.returncode == 128 + by, output
        assert "Traceback" not in output
        return output

    def finish(self) -> str:
        """Wait for the regular end; return what was printed."""
        try:
            code = self.process.wait(600)
        finally:
            self.process.kill()
        self._reader.join()
        output = "".join(self.lines)
        assert code == 0, output
        return output


def says(words: str) -> Callable[[Command], bool]:
    return lambda command: words in "".join(command.lines)


def has_child(name: str) -> Callable[[Command], bool]:
    """The process has started one whose executable has this name."""

    def find(command: Command) -> bool:
        listed = subprocess.run(["ps", "-o", "comm=", "--ppid", str(command.process.pid)], capture_output=True)
        return name.encode() in listed.stdout

    return find


def after(seconds: float, moment: Callable[[Command], bool]) -> Callable[[Command], bool]:
    """Some time after a moment."""
    seen: list[float] = []

    def is_later(command: Command) -> bool:
        if not seen and moment(command):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + seconds

    return is_later


_MOMENTS = {
    "gcs_server": (has_child("gcs_server"), signal.SIGTERM, 1),
    "raylet": (has_child("raylet"), signal.SIGINT, 1),
    "extract": (says("extract: 5"), signal.SIGTERM, 1),
    "labels": (says("labels: 5"), signal.SIGINT, 1),
    "train": (says("train: 40"), signal.SIGTERM, 2),
    "train, its workers starting": (after(8, says("train: 40")), signal.SIGINT, 1),
    "evaluate": (says("evaluate: 2"), signal.SIGTERM, 1),
}


@pytest.mark.ray
@pytest.mark.reports
@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(("gcs_server", "train"), marks=pytest.mark.slow),
        pytest.param(tuple(_MOMENTS), marks=pytest.mark.long),
    ],
    ids=["some", "all"],
)
def test_run__stopped_at_any_moment_says_so_soon_and_goes_on(moments: tuple[str, ...], tmp_path: Path) -> None:
    data, run = make_folder(tmp_path / "photos", num_images=5), tmp_path / "run"
    arguments = ("run", str(run), "--preset", "tiny_cpu", "--data", str(data), *_SETTINGS)
    for name in moments:
        moment, by, times = _MOMENTS[name]
        command = Command(*arguments, cwd=tmp_path)
        command.reach(moment)
        assert _LAST in command.stop(by=by, times=times), name
    output = Command(*arguments, cwd=tmp_path).finish()
    assert "labels: done" not in output, "it had been finished before"
    assert json.loads((run / "register.json").read_text())["rows_out"] == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.reports
@pytest.mark.parametrize(
    ("arguments", "moment", "by"),
    [
        (("pretrain", "out", "--preset", "small_photos", *_PRETRAIN), after(3, says("train: ")), signal.SIGTERM),
        pytest.param(
            ("tune", "out", "--space", "space.yaml", "--sampler", "grid", *_TUNE),
            after(9, says("trials: ")),
            signal.SIGTERM,
            marks=pytest.mark.long,
        ),
        (("plan", "--preset", "tiny_cpu", *_SETTINGS), has_child("raylet"), signal.SIGTERM),
    ],
    ids=["pretrain", "tune", "plan"],
)
def test_other_commands__stopped_say_so_soon(
    arguments: tuple[str, ...], moment: Callable[[Command], bool], by: int, tmp_path: Path
) -> None:
    data = (make_voc if "voc" in arguments else make_folder)(tmp_path / "photos")
    (tmp_path / "space.yaml").write_text("train.omega_1: [0.5, 1.0]")
    command = Command(*arguments, "--data", str(data), cwd=tmp_path)
    command.reach(moment)
    assert _LAST in command.stop(by=by)


@pytest.mark.slow
@pytest.mark.reports
def test_predict__without_ray_stopped_says_so_soon_and_goes_on(finished: Run, tmp_path: Path) -> None:
    data, out = make_folder(tmp_path / "photos", num_images=190), tmp_path / "out"
    arguments = ("predict", finished.folder.uri, "--images", str(data), "--out", str(out), "--probabilities")
    command = Command(*arguments, cwd=tmp_path)
    command.reach(lambda _: any(out.glob(".units/*/*.json")))
    assert _LAST in command.stop(by=signal.SIGTERM)
    Command(*arguments, cwd=tmp_path).finish()
    assert json.loads((out / "predict.json").read_text())["units_resumed"] > 0
