"""Faults inside the processes of a cluster: each waits for a file with its name, which the campaign lays down."""

import functools
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Variables of processes: the folder of those files, seconds by which a clock is wrong, whether memory may be used up.
FOLDER, CLOCK, GREEDY = "TRANSFGU_FAULTS_FOLDER", "TRANSFGU_FAULTS_CLOCK_S", "TRANSFGU_FAULTS_GREEDY"
FREEZE_IN_UNIT, DIE_AFTER_WRITE, FILL_MEMORY = "freeze in unit", "die after write", "fill memory"
HOG_BYTES = 2**31 - 2**28
_STEP_BYTES = 2**24
_PATIENCE_S = 30


def install() -> None:
    """Prepare this process, unless it belongs to no campaign."""
    if FOLDER not in os.environ:
        return
    import fsspec

    fsspec.register_implementation("stutter", "tests.faults.stutter.StutteringFileSystem", clobber=True)
    sys.meta_path.insert(0, _Parts())
    if CLOCK in os.environ:
        _shift_clock(float(os.environ[CLOCK]))


def control(name: str) -> Path:
    """Return the file of a fault in this process."""
    return Path(os.environ[FOLDER], name)


def claim(name: str) -> Path | None:
    """Return a file of this process if it is the first that meets a fault, else None."""
    claimed = control(f"{name} by {os.getpid()}")
    with suppress(OSError):
        return control(name).rename(claimed)
    return None


class _Parts:
    """Finds the module that writes parts, and adds faults to it once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "transfgu_ray.engine.parts":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.PartWorker.write = _with_faults(module.PartWorker.write)

        loader.exec_module = exec_module
        return spec


def _with_faults(write: Any) -> Any:
    @functools.wraps(write)
    def faulty(*arguments: Any, **named: Any) -> Any:
        if claim(FREEZE_IN_UNIT):
            os.kill(os.getpid(), signal.SIGSTOP)
        result = write(*arguments, **named)
        # Here the part exists, and nobody has been told so.
        if claim(DIE_AFTER_WRITE):
            os.kill(os.getpid(), signal.SIGKILL)
        if GREEDY in os.environ and (claimed := claim(FILL_MEMORY)):
            _fill_memory(claimed)
        return result

    return faulty


def _fill_memory(note: Path) -> None:
    """Take memory until this process is killed; leave a note where nobody does."""
    taken = []
    while sum(map(len, taken)) < HOG_BYTES:
        taken.append(bytearray(os.urandom(4096) * (_STEP_BYTES // 4096)))
        time.sleep(0.02)
    time.sleep(_PATIENCE_S)
    note.write_text("survived")


def _shift_clock(seconds: float) -> None:
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() + seconds
    time.time_ns = lambda: right_ns() + int(seconds * 1e9)
