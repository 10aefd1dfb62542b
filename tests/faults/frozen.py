"""Faults of processes that live and do nothing: the watchdog must end the command, and the same one then continues."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.builders import make_voc
from tests.faults.bench import WORKERS, Bench, Compared, clean_of, kill, last_line, num_epochs, signal_all
from tests.faults.hooks import FREEZE_IN_UNIT

# Longer than Ray Train takes to start on a busy machine.
_PATIENCE_MIN = 1.5
# Beyond the patience, for the end itself.
_GRACE_MIN = 1.0
_NORMAL = ("--set", "runtime.stall_minutes=60")
# Files that a trial writes as it goes on.
_SIGNS = ("history.json", "train.json", "evaluate.json", "report.json", "register.json")
_NUM_PHOTOS = 24
_SPACE = {"train.omega_1": [0.0, 1.0]}


def workers_frozen(bench: Bench, run: Path, stage: str) -> str | None:
    """Freeze every actor by SIGSTOP; the command ends with an error and continues when repeated."""
    return _frozen(
        bench, run, stage, is_hit=bench.moment(stage, run), pids=lambda: bench.cluster.workers(WORKERS[stage])
    )


def unit_frozen(bench: Bench, run: Path, stage: str) -> str | None:
    """Let one actor freeze between the work on a unit and the writing of its part; the others finish theirs."""
    middle, is_laid = bench.moment(stage, run), False

    def frozen() -> list[int]:
        return [int(path.name.split()[-1]) for path in bench.cluster.claimed(FREEZE_IN_UNIT)]

    def is_hit() -> bool:
        nonlocal is_laid
        if not is_laid and middle():
            (bench.cluster.faults / FREEZE_IN_UNIT).touch()
            is_laid = True
        return bool(frozen())

    return _frozen(bench, run, stage, is_hit=is_hit, pids=frozen)


def clustering_frozen(bench: Bench, run: Path, stage: str) -> str | None:
    """Freeze the process that clusters."""

    def clustering() -> list[int]:
        return bench.cluster.workers("_fit_in_memory")

    return _frozen(bench, run, stage, is_hit=lambda: bool(clustering()), pids=clustering)


def _frozen(
    bench: Bench, run: Path, stage: str, *, is_hit: Callable[[], bool], pids: Callable[[], list[int]]
) -> str | None:
    process = bench.start(stage, run, "--set", f"runtime.stall_minutes={_PATIENCE_MIN}")
    if not bench.wait_until(is_hit, process):
        return None
    frozen = pids()
    if not frozen:
        kill(process)
        return None
    signal_all(frozen, signal.SIGSTOP)
    said = last_line(bench.end(process, 1, timeout=60 * (_PATIENCE_MIN + _GRACE_MIN)))
    _kill_left(frozen)
    bench.finish(stage, run, *_NORMAL)
    if f"stage {stage}" not in said:
        raise RuntimeError(f"the stage is not named: {said}")
    return said


def _kill_left(pids: list[int]) -> None:
    signal_all([pid for pid in pids if Path(f"/proc/{pid}").exists()], signal.SIGKILL)


def trial_frozen(bench: Bench, run: Path, stage: str) -> str | None:
    """Freeze the training of one trial of a sweep; the sweep ends with an error that names the trial."""
    quiet, space = clean_of(run), run.with_name(f"{run.name}-space.yaml")
    # Few, since a trial trains two students.
    photos = make_voc(run.with_name(f"{run.name}-voc"), num_train=_NUM_PHOTOS, num_val=3)
    space.write_text(yaml.safe_dump(_SPACE))
    command = (
        *("--space", space, "--sampler", "grid", "--objective", "score"),
        *("--data", photos, "--dataset", "voc", *bench.settings),
        *("--weights", bench.quiet / "model/encoder.safetensors"),
        *("--set", "train.round_epochs=[1, 3]", "--set", "runtime.num_workers=1", "--set", "runtime.train_workers=1"),
    )
    bench.finish("tune", quiet, *command)
    # Both sweeps share what their trials begin with.
    shutil.rmtree(run)
    run.mkdir()
    shutil.copytree(quiet / "shared", run / "shared")
    process = bench.start("tune", run, *command, "--set", f"runtime.stall_minutes={_PATIENCE_MIN}")

    def an_epoch_is_done() -> bool:
        return any(num_epochs(trial) for trial in (run / "trials").glob("*/"))

    if not bench.wait_until(an_epoch_is_done, process):
        return None
    frozen = bench.cluster.workers(WORKERS[stage])[:1]
    if not frozen:
        kill(process)
        return None
    signal_all(frozen, signal.SIGSTOP)
    printed = bench.end(process, 1)
    took_min = (time.time() - _last_sign(run)) / 60
    _kill_left(frozen)
    unfinished = [trial.name for trial in (run / "trials").glob("*/") if not (trial / "register.json").exists()]
    bench.finish("tune", run, *command, *_NORMAL)
    said = "\n".join(printed.strip().splitlines()[-3:])
    if not any(trial in said for trial in unfinished):
        raise RuntimeError(f"the trial {' or '.join(unfinished)} is not named: {said}")
    if took_min > _PATIENCE_MIN + _GRACE_MIN:
        raise RuntimeError(f"ended {took_min:.1f} min after the last sign of life")
    return said


def _last_sign(sweep: Path) -> float:
    """Return when a trial last went on; one that is not frozen does so meanwhile."""
    return max(path.stat().st_mtime for path in (sweep / "trials").rglob("*.json") if path.name in _SIGNS)


def compare_sweeps(quiet: Path, run: Path) -> Compared:
    """Compare the models of all trials of two sweeps."""
    models = [
        {path.relative_to(sweep): path.read_bytes() for path in sweep.glob("trials/*/model/decoder.safetensors")}
        for sweep in (quiet, run)
    ]
    lost, added = (len(one.keys() - other.keys()) for one, other in (models, models[::-1]))
    return Compared(models[0] == models[1] and bool(models[0]), lost, added)
