"""What every fault needs: a cluster, an undisturbed run on it, copies of that run to disturb, and a comparison."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.builders import make_voc
from tests.faults.cluster import Cluster
from transfgu_ray.runs.stages import STAGES

NUM_PHOTOS = 90
_SETTINGS = (
    "encoder.overrides={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}",
    "data.image_size=[64, 64]",
    "extract.window_fracs=[0.5, 0.3]",
    "extract.images_per_part=1",
    "concepts.num_concepts=4",
    "train.batch_size=4",
    "train.round_epochs=[2, 2, 2]",
    "evaluate.num_samples=2",
    "evaluate.baselines=[]",
    "runtime.num_workers=2",
    "runtime.train_workers=2",
)
TABLES = {"extract": ("features", ["image_id", "crop_id"]), "labels": ("labels", ["image_id"])}
WORKERS = {"extract": "FeatureExtractor", "labels": "BankBuilder", "train": "TrainWorker"}
TIMEOUT_S = 600


class WrongExit(RuntimeError):
    """A command ended with another exit code than it should have, or did not end."""


@dataclass
class Outcome:
    """The outcome of all tries of one fault.

    Attributes:
        fault: name of the fault.
        tried: number of tries.
        recovered: number of tries that ended with the result of the undisturbed run.
        rows_lost: rows of the undisturbed run that were missing.
        rows_doubled: rows that appeared more than once.
        exits_right: number of tries of which every command ended with the exit code that it should have.
        seconds_lost: mean seconds beyond those of the undisturbed stage.
        notes: message to the user per try, or why it did not recover.
    """

    fault: str
    tried: int = 0
    recovered: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    exits_right: int = 0
    seconds_lost: float = 0.0
    notes: list[str] = field(default_factory=list)

    def add(self, compared: "Compared", *, exits_right: bool, seconds_lost: float, note: str) -> None:
        """Count a try."""
        self.seconds_lost = (self.seconds_lost * self.tried + seconds_lost) / (self.tried + 1)
        self.tried += 1
        self.recovered += compared.is_equal
        self.rows_lost += compared.rows_lost
        self.rows_doubled += compared.rows_doubled
        self.exits_right += exits_right
        self.notes.append(note)

    def describe(self) -> dict[str, Any]:
        """Return the outcome as stored in the JSON file."""
        return asdict(self) | {"seconds_lost": round(self.seconds_lost, 1)}


@dataclass(frozen=True)
class Compared:
    """Comparison of a disturbed stage with the undisturbed one."""

    is_equal: bool
    rows_lost: int = 0
    rows_doubled: int = 0


class Bench:
    """A cluster, an undisturbed run on it, and copies of that run to disturb.

    Args:
        folder: of runs and photographs.
        cluster: of three nodes with at least one CPU each.
        seed: of the moments at which faults happen.

    Attributes:
        wrong_exits: what was wrong with the ends of commands, since it was last cleared.
    """

    def __init__(self, folder: Path, cluster: Cluster, seed: int) -> None:
        self.folder, self.cluster, self.rng = folder, cluster, random.Random(seed)
        self.photos = make_voc(folder / "voc", num_train=NUM_PHOTOS, num_val=6)
        self.quiet = folder / "quiet"
        self.settings = ["--preset", "tiny_cpu", *(part for each in _SETTINGS for part in ("--set", each))]
        self.options = ["--data", str(self.photos), "--dataset", "voc", *self.settings]
        self.wrong_exits: list[str] = []
        self.finish("run", self.quiet, *self.options)
        self._num_copies = 0

    def seconds(self, *stages: str) -> float:
        """Return the seconds of undisturbed stages."""
        return sum(json.loads((self.quiet / f"{stage}.json").read_text())["seconds"] for stage in stages)

    def copy_before(self, stage: str) -> Path:
        """Return a copy of the undisturbed run as it was before a stage."""
        self._num_copies += 1
        copy = self.folder / f"{stage}-{self._num_copies}"
        later = STAGES.lasting[STAGES.lasting.index(stage) :]
        outputs = {output for each in later for output in (*STAGES[each].outputs, f"{each}.json", f"{each}.files.json")}

        def unwanted(folder: str, names: list[str]) -> set[str]:
            inside = Path(folder).relative_to(self.quiet)
            return {name for name in names if str(inside / name) in outputs or name.startswith(("mlflow", "mlruns"))}

        return shutil.copytree(self.quiet, copy, ignore=unwanted)

    def start(self, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        """Start the real command in its own process group, on the cluster, with further environment variables."""
        environment = self.cluster.environment | variables
        return start(*arguments, "--ray-address", self.cluster.address, environment=environment)

    def end(self, process: subprocess.Popen[str], *expected: int, timeout: float = TIMEOUT_S) -> str:
        """Wait for a command and return its output; note an exit code that is none of those expected (none given: 0).

        Raises:
            WrongExit: it should have done its work and has not, or did not end at all.
        """
        expected = expected or (0,)
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill(process)
            self.wrong_exits.append(f"no end within {timeout:.0f} s")
            raise WrongExit(f"no end within {timeout:.0f} s: {process.args}") from None
        if process.returncode not in expected:
            words = f"exit code {process.returncode}, not {' or '.join(map(str, expected))}: {last_line(printed)}"
            self.wrong_exits.append(words)
            if 0 in expected:
                raise WrongExit(f"{words}\n{printed[-2000:]}")
        return printed

    def finish(self, *arguments: str | Path) -> str:
        """Run the real command to its end and return its output."""
        return self.end(self.start(*arguments))

    def wait_until(
        self, is_hit: Callable[[], bool], process: subprocess.Popen[str], timeout: float = TIMEOUT_S
    ) -> bool:
        """Wait for the moment of a fault; return False where the command has done its work before it.

        Raises:
            WrongExit: the command failed before it.
        """
        end = time.monotonic() + timeout
        while not is_hit():
            if process.poll() is not None:
                self.end(process)
                return False
            if time.monotonic() > end:
                kill(process)
                raise TimeoutError("the moment of the fault did not come")
            time.sleep(0.01)
        return True

    def moment(self, stage: str, run: Path) -> Callable[[], bool]:
        """Return a test for a random moment in the middle of a stage."""
        if stage == "train":
            epochs = self.rng.randint(1, 4)
            return lambda: num_epochs(run) >= epochs
        parts = self.rng.randint(NUM_PHOTOS // 10, NUM_PHOTOS // 2)
        return lambda: num_parts(run, stage) >= parts


def start(*arguments: str | Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the real command in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "transfgu_ray.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], expected: int = 0, timeout: float = TIMEOUT_S) -> str:
    """Wait for a command and return its output.

    Raises:
        WrongExit: it ended with another exit code.
    """
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise WrongExit(f"{process.args} hung") from None
    if process.returncode != expected:
        raise WrongExit(f"exit code {process.returncode}, not {expected}: {printed[-2000:]}")
    return printed


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a command and its children by SIGKILL."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def signal_all(pids: Collection[int], number: int) -> None:
    """Send a signal to processes."""
    for pid in pids:
        os.kill(pid, number)


def last_line(printed: str) -> str:
    """Return the last line that the user reads, before the one that names the log."""
    lines = [line for line in printed.strip().splitlines() if not line.startswith("transfgu: the log has more")]
    return lines[-1] if lines else ""


def num_epochs(run: Path) -> int:
    """Return the number of finished epochs of a training."""
    history = run / "train/history.json"
    return len(json.loads(history.read_text())) if history.exists() else 0


def num_parts(run: Path, stage: str) -> int:
    """Return the number of parts of the table of a stage."""
    table = run / TABLES[stage][0]
    return sum(path.suffix == ".parquet" for path in table.iterdir()) if table.is_dir() else 0


def compare(stage: str, quiet: Path, run: Path) -> Compared:
    """Compare the results of a stage with those of the undisturbed run."""
    if stage == "train":
        epochs = [row["epoch"] for row in json.loads((run / "train/history.json").read_text())]
        wanted = num_epochs(quiet)
        models = [(folder / "model/decoder.safetensors").read_bytes() for folder in (quiet, run)]
        lost, doubled = len(set(range(wanted)) - set(epochs)), len(epochs) - len(set(epochs))
        return Compared(models[0] == models[1] and not lost and not doubled, lost, doubled)
    if stage == "concepts":
        one, other = (pq.read_table(folder / "concepts.parquet") for folder in (quiet, run))
        return Compared(one.equals(other), max(0, len(one) - len(other)), max(0, len(other) - len(one)))
    table, key = TABLES[stage]
    expected, found = (pq.read_table(folder / table).replace_schema_metadata() for folder in (quiet, run))
    keys, found_keys = (rows.select(key).to_pylist() for rows in (expected, found))
    unique = {tuple(row.values()) for row in found_keys}
    lost = len({tuple(row.values()) for row in keys} - unique)
    return Compared(found.equals(expected), lost, len(found_keys) - len(unique))


def clean_of(run: Path) -> Path:
    """Return the undisturbed run of a fault that needs a separate one."""
    return run.with_name(f"{run.name}-clean")


@dataclass(frozen=True)
class Fault:
    """A fault and the function that injects it.

    Attributes:
        name: of the fault.
        stage: to disturb and compare.
        do: injects the fault into a run once; returns the message to the user, or None where the stage ended too early.
        begins: stage before which the run is copied; None = the one to disturb.
        compare: compares an undisturbed with a disturbed folder; None = the results of the stage.
    """

    name: str
    stage: str
    do: Callable[[Bench, Path, str], str | None]
    begins: str | None = None
    compare: Callable[[Path, Path], Compared] | None = None

    def tries(self, bench: Bench, times: int, say: Callable[[str], None]) -> Outcome:
        """Inject the fault several times; a try whose stage ended before the moment of the fault does not count."""
        outcome, missed = Outcome(self.name), 0
        while outcome.tried < times and missed < 3:
            if self._try(bench, outcome):
                say(outcome.notes[-1])
            else:
                missed += 1
                say("the stage ended before the fault")
        return outcome

    def _try(self, bench: Bench, outcome: Outcome) -> bool:
        bench.cluster.mend()
        bench.wrong_exits.clear()
        run, began = bench.copy_before(self.begins or self.stage), time.monotonic()
        compared, seconds_lost = Compared(False), 0.0
        try:
            note = self.do(bench, run, self.stage)
            if note is None:
                return False
            clean, taken = clean_of(run), time.monotonic() - began
            compared = self._compare(clean if clean.exists() else bench.quiet, run)
            seconds_lost = taken - bench.seconds(*self._stages())
        except (RuntimeError, TimeoutError, OSError, pa.ArrowInvalid, ValueError) as error:
            note = f"{type(error).__name__}: {error}"
        outcome.add(
            compared,
            exits_right=not bench.wrong_exits,
            seconds_lost=seconds_lost,
            note="; ".join([note, *(words for words in bench.wrong_exits if words not in note)]),
        )
        for folder in (run, clean_of(run)):
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _compare(self, quiet: Path, run: Path) -> Compared:
        return compare(self.stage, quiet, run) if self.compare is None else self.compare(quiet, run)

    def _stages(self) -> tuple[str, ...]:
        last, first = (STAGES.lasting.index(name) for name in (self.stage, self.begins or self.stage))
        return STAGES.lasting[min(first, last) : last + 1]
