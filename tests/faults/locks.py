"""Two writers of one folder, and clocks that are wrong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.faults import hooks
from tests.faults.bench import TABLES, Bench, Compared, Outcome, kill, last_line, num_parts
from tests.faults.storage import FaultyStore, s3_server

_PAIRS_AT_ONCE = 8
# Before a moment, so that every process hears of it in time; and the most by which one of a pair is late.
_NOTICE_S, _LATE_S = 0.2, 0.05
YEAR_S = 365 * 86400
HOUR_S = 3600


def second_writer(bench: Bench, run: Path, stage: str) -> str | None:
    """Start the same command twice: the second is refused and does not disturb the first."""
    process = bench.start(stage, run)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    # So that the first does not end before the second begins.
    os.kill(process.pid, signal.SIGSTOP)
    said = last_line(bench.end(bench.start(stage, run), 2))
    os.kill(process.pid, signal.SIGCONT)
    bench.end(process)
    return said


def file_times_wrong(seconds: float) -> Callable[[Bench, Path, str], str | None]:
    """Return a fault: all files are so many seconds newer than the clock says, as another machine may have made them.

    The living lock is still respected, and after a kill the parts that exist are neither made again nor lost.
    """

    def do(bench: Bench, run: Path, stage: str) -> str | None:
        process = bench.start(stage, run)
        if not bench.wait_until(bench.moment(stage, run), process):
            return None
        os.kill(process.pid, signal.SIGSTOP)
        _shift_times(run, seconds)
        said = last_line(bench.end(bench.start(stage, run), 2))
        kill(process)
        parts = {path: path.stat().st_mtime_ns for path in _shift_times(run, seconds) if path.suffix == ".parquet"}
        bench.finish(stage, run)
        again = [path.name for path, mtime in parts.items() if path.stat().st_mtime_ns != mtime]
        if again:
            raise RuntimeError(f"made again: {', '.join(again)}")
        return f"{len(parts)} parts kept; {said}"

    return do


def _shift_times(run: Path, seconds: float) -> list[Path]:
    """Set the times of all files of a run to now and so many seconds; return the parts of tables."""
    moment, parts = time.time() + seconds, []
    for path in run.rglob("*"):
        # Files that are being written disappear.
        try:
            os.utime(path, (moment, moment))
        except FileNotFoundError:
            continue
        if path.parent.name in {table for table, _ in TABLES.values()}:
            parts.append(path)
    return parts


def clock_wrong(seconds: float) -> Callable[[Bench, Path, str], str | None]:
    """Return a fault: the command's `time.time` is so many seconds ahead of the nodes'; after a kill it is right."""

    def do(bench: Bench, run: Path, stage: str) -> str | None:
        process = bench.start(stage, run, **{hooks.CLOCK: str(seconds)})
        if not bench.wait_until(bench.moment(stage, run), process):
            return None
        kill(process)
        before = num_parts(run, stage)
        return f"{before} parts kept; {last_line(bench.finish(stage, run))}"

    return do


@dataclass(frozen=True)
class Race:
    """Pairs of processes that lock one folder at the same moment: exactly one of the two may get it.

    Attributes:
        name: of the fault.
        pairs: number of pairs; each counts as a try.
        is_remote: whether the folders are in an object store.
    """

    name: str
    pairs: int
    is_remote: bool

    def tries(self, bench: Bench, times: int, say: Callable[[str], None]) -> Outcome:
        """Let all pairs race; return how often exactly one of two got the folder and the other was refused."""
        outcome = Outcome(self.name)
        with s3_server() if self.is_remote else nullcontext() as store:
            at_once = min(_PAIRS_AT_ONCE, self.pairs)
            with _contenders(bench, self.name, at_once, store) as pairs:
                for _ in range(self.pairs // at_once):
                    for answers in _race(bench, pairs):
                        is_right = sorted(answers) == ["in", "refused"]
                        note = " and ".join(sorted(answers))
                        outcome.add(Compared(is_right), exits_right=is_right, seconds_lost=0.0, note=note)
        for note in sorted(set(outcome.notes)):
            say(f"{outcome.notes.count(note)} x {note}")
        return outcome


_Pair = tuple[subprocess.Popen[str], subprocess.Popen[str]]


@contextmanager
def _contenders(bench: Bench, name: str, count: int, store: FaultyStore | None) -> Iterator[list[_Pair]]:
    """Start pairs of processes, each pair with a folder of its own."""
    environment = bench.cluster.environment | ({} if store is None else store.env)

    def contender(pair: int) -> subprocess.Popen[str]:
        uri = str(bench.folder / "races" / str(pair)) if store is None else f"s3://bucket/races/{pair}"
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.contender", uri],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    pairs = [(contender(pair), contender(pair)) for pair in range(count)]
    try:
        for pair in pairs:
            for process in pair:
                _hear(process)
        yield pairs
    finally:
        for pair in pairs:
            for process in pair:
                kill(process)


def _race(bench: Bench, pairs: list[_Pair]) -> list[list[str]]:
    """Let each pair begin at once, or nearly so; return what both got."""
    now = time.monotonic()
    for number, pair in enumerate(pairs):
        moment = now + _NOTICE_S * (1 + number)
        # Half of them exactly at once.
        late = bench.rng.choice([0.0, bench.rng.uniform(0, _LATE_S)])
        for process, each in zip(pair, (moment, moment + late), strict=True):
            _tell(process, str(each))
    # Whoever is in stays there until both have answered.
    answers = [[_hear(process) for process in pair] for pair in pairs]
    for pair in pairs:
        for process in pair:
            _tell(process, "leave")
    for pair in pairs:
        for process in pair:
            _hear(process)
    return answers


def _tell(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{words}\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    heard = process.stdout.readline().strip()
    if not heard:
        raise RuntimeError("a contender died")
    return heard
