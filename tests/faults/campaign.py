"""Faults that a run must survive: each disturbs a small real run on a real cluster, and the results are compared."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.builders import make_voc
from tests.faults.cluster import Cluster
from tests.faults.hostile import make_hostile_corpus
from tests.faults.storage import SmallDisk, flip_byte, s3_server, tmpfs, truncate
from transfgu_ray.runs.stages import STAGES

_NUM_PHOTOS = 90
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
_TABLES = {"extract": ("features", ["image_id", "crop_id"]), "labels": ("labels", ["image_id"])}
WORKERS = {"extract": "FeatureExtractor", "labels": "BankBuilder", "train": "TrainWorker"}
_TIMEOUT_S = 600
# Longer than Ray Train takes to start on a busy machine.
_PATIENCE_MIN = 1.5


@dataclass
class Outcome:
    """The outcome of all tries of one fault.

    Attributes:
        fault: name of the fault.
        tried: number of tries.
        recovered: number of tries that ended with the result of the undisturbed run.
        rows_lost: rows of the undisturbed run that were missing.
        rows_doubled: rows that appeared more than once.
        seconds_lost: mean seconds beyond those of the undisturbed stage.
        notes: message to the user per try, or why it did not recover.
    """

    fault: str
    tried: int = 0
    recovered: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    seconds_lost: float = 0.0
    notes: list[str] = field(default_factory=list)

    def add(self, compared: "Compared", seconds_lost: float, note: str) -> None:
        """Count a try."""
        self.seconds_lost = (self.seconds_lost * self.tried + seconds_lost) / (self.tried + 1)
        self.tried += 1
        self.recovered += compared.is_equal
        self.rows_lost += compared.rows_lost
        self.rows_doubled += compared.rows_doubled
        self.notes.append(note)

    def describe(self) -> dict[str, Any]:
        """Return the outcome as stored in the JSON file."""
        return asdict(self) | {"seconds_lost": round(self.seconds_lost, 1)}


@dataclass(frozen=True)
class Compared:
    """Comparison of a disturbed stage with the undisturbed one."""

    is_equal: bool
    rows_lost: int
    rows_doubled: int


class Bench:
    """A cluster, an undisturbed run on it, and copies of that run to disturb.

    Args:
        folder: of runs and photographs.
        cluster: of three nodes with at least one CPU each.
        seed: of the moments at which faults happen.
    """

    def __init__(self, folder: Path, cluster: Cluster, seed: int) -> None:
        self.folder, self.cluster, self.rng = folder, cluster, random.Random(seed)
        self.photos = make_voc(folder / "voc", num_train=_NUM_PHOTOS, num_val=6)
        self.quiet = folder / "quiet"
        settings = [part for setting in _SETTINGS for part in ("--set", setting)]
        self.options = ["--preset", "tiny_cpu", "--data", str(self.photos), "--dataset", "voc", *settings]
        self.finish("run", self.quiet, *self.options)
        self._num_copies = 0

    def seconds(self, stage: str) -> float:
        """Return the seconds of the undisturbed stage."""
        return json.loads((self.quiet / f"{stage}.json").read_text())["seconds"]

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

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start the real command in its own process group, on the cluster."""
        return start(*arguments, "--ray-address", self.cluster.address, environment=self.cluster.environment)

    def finish(self, *arguments: str | Path) -> str:
        """Run the real command to its end and return its output."""
        return finish(self.start(*arguments))

    def wait_until(self, is_hit: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
        """Wait for the moment of a fault; return False where the command ended before it."""
        end = time.monotonic() + _TIMEOUT_S
        while not is_hit():
            if process.poll() is not None:
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
        parts = self.rng.randint(_NUM_PHOTOS // 10, _NUM_PHOTOS // 2)
        table = run / _TABLES[stage][0]
        return lambda: table.is_dir() and sum(path.suffix == ".parquet" for path in table.iterdir()) >= parts


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


def finish(process: subprocess.Popen[str], expected: int = 0, timeout: float = _TIMEOUT_S) -> str:
    """Wait for a command and return its output.

    Raises:
        RuntimeError: it ended with another exit code.
    """
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise RuntimeError(f"{process.args} hung") from None
    if process.returncode != expected:
        raise RuntimeError(f"exit code {process.returncode}, not {expected}: {printed[-2000:]}")
    return printed


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a command and its children by SIGKILL."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def last_line(printed: str) -> str:
    """Return the last line that the user reads."""
    return printed.strip().splitlines()[-1] if printed.strip() else ""


def num_epochs(run: Path) -> int:
    """Return the number of finished epochs of a training."""
    history = run / "train/history.json"
    return len(json.loads(history.read_text())) if history.exists() else 0


def compare(stage: str, quiet: Path, run: Path) -> Compared:
    """Compare the results of a stage with those of the undisturbed run."""
    if stage == "train":
        epochs = [row["epoch"] for row in json.loads((run / "train/history.json").read_text())]
        wanted = num_epochs(quiet)
        models = [(folder / "model/decoder.safetensors").read_bytes() for folder in (quiet, run)]
        lost, doubled = len(set(range(wanted)) - set(epochs)), len(epochs) - len(set(epochs))
        return Compared(models[0] == models[1] and not lost and not doubled, lost, doubled)
    table, key = _TABLES[stage]
    expected, found = (pq.read_table(folder / table).replace_schema_metadata() for folder in (quiet, run))
    keys, found_keys = (rows.select(key).to_pylist() for rows in (expected, found))
    unique = {tuple(row.values()) for row in found_keys}
    lost = len({tuple(row.values()) for row in keys} - unique)
    return Compared(found.equals(expected), lost, len(found_keys) - len(unique))


@dataclass(frozen=True)
class Fault:
    """A fault and the function that injects it.

    Attributes:
        name: of the fault.
        stage: to disturb and compare.
        do: injects the fault into a run once; returns the message to the user, or None where the stage ended too early.
        is_finished: whether the stage is finished before the fault.
    """

    name: str
    stage: str
    do: Callable[[Bench, Path, str], str | None]
    is_finished: bool = False


def tries(bench: Bench, fault: Fault, times: int) -> Outcome:
    """Inject a fault several times; a try whose stage ended before the moment of the fault does not count."""
    outcome, missed = Outcome(fault.name), 0
    while outcome.tried < times and missed < 3:
        run = bench.copy_before(STAGES.lasting[STAGES.lasting.index(fault.stage) + fault.is_finished])
        began = time.monotonic()
        try:
            note = fault.do(bench, run, fault.stage)
            if note is None:
                missed += 1
                continue
            clean = clean_of(run)
            compared = compare(fault.stage, clean if clean.exists() else bench.quiet, run)
            outcome.add(compared, time.monotonic() - began - bench.seconds(fault.stage), note)
        except (RuntimeError, TimeoutError, OSError, pa.ArrowInvalid, ValueError) as error:
            outcome.add(Compared(False, 0, 0), 0.0, f"{type(error).__name__}: {error}")
        shutil.rmtree(run, ignore_errors=True)
    return outcome


def driver_killed(bench: Bench, run: Path, stage: str) -> str | None:
    """Kill the command by SIGKILL and repeat it."""
    process = bench.start(stage, run)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    kill(process)
    return last_line(bench.finish(stage, run))


def worker_killed(bench: Bench, run: Path, stage: str) -> str | None:
    """Kill an actor by SIGKILL; Ray starts another."""
    process = bench.start(stage, run)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    pids = bench.cluster.workers(WORKERS[stage])
    if not pids:
        kill(process)
        return None
    os.kill(bench.rng.choice(pids), signal.SIGKILL)
    return last_line(finish(process))


def node_lost(bench: Bench, run: Path, stage: str) -> str | None:
    """Kill every process of a working node by SIGKILL; the others continue. A new node replaces it afterwards."""
    process = bench.start(stage, run)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    nodes = [bench.cluster.node_of(pid) for pid in bench.cluster.workers(WORKERS[stage])]
    lost = [node for node in nodes if node is not None and node is not bench.cluster.nodes[0]]
    if not lost:
        kill(process)
        return None
    bench.cluster.lose(lost[0])
    try:
        return last_line(finish(process))
    finally:
        bench.cluster.add_node()


def worker_frozen(bench: Bench, run: Path, stage: str) -> str | None:
    """Freeze every actor by SIGSTOP; the command ends with an error and continues when repeated."""
    process = bench.start(stage, run, "--set", f"runtime.stall_minutes={_PATIENCE_MIN}")
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    pids = bench.cluster.workers(WORKERS[stage])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    said = last_line(finish(process, 1))
    for pid in bench.cluster.workers(WORKERS[stage]):
        os.kill(pid, signal.SIGKILL)
    bench.finish(stage, run, "--set", "runtime.stall_minutes=60")
    return said


def second_writer(bench: Bench, run: Path, stage: str) -> str | None:
    """Start the same command twice: the second is refused and does not disturb the first."""
    process = bench.start(stage, run)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    # So that the first does not end before the second begins.
    os.kill(process.pid, signal.SIGSTOP)
    said = last_line(finish(bench.start(stage, run), 2))
    os.kill(process.pid, signal.SIGCONT)
    finish(process)
    return said


def job_stopped(bench: Bench, run: Path, stage: str) -> str | None:
    """Stop a job by `ray job stop`; the same job, submitted again, continues."""
    if len(bench.cluster.nodes) > 1:
        bench.cluster.restart_alone()
    job = f"stopped-{run.name}"
    process = submit(bench, run, stage, job)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    finish(bench.cluster.stop_job(job))
    said = finish(process)
    finish(submit(bench, run, stage, f"{job}-again"))
    return last_line(said)


def head_lost(bench: Bench, run: Path, stage: str) -> str | None:
    """Kill the head, and so the job, by SIGKILL; submit the job again to a new cluster at the same address."""
    if len(bench.cluster.nodes) > 1:
        bench.cluster.restart_alone()
    process = submit(bench, run, stage, f"lost-{run.name}")
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    bench.cluster.restart_alone()
    process.communicate(timeout=_TIMEOUT_S)
    return last_line(finish(submit(bench, run, stage, f"lost-{run.name}-again")))


def submit(bench: Bench, run: Path, stage: str, job: str) -> subprocess.Popen[str]:
    """Submit a stage by `ray job submit`."""
    root = Path(__file__).resolve().parents[2]
    return bench.cluster.submit("python", f"jobs/{stage}.py", str(run), working_dir=root, job=job)


def part_truncated(bench: Bench, run: Path, stage: str) -> str:
    """Cut a part of a finished table in half; the same command makes the part again."""
    return _damaged(bench, run, stage, truncate)


def part_flipped(bench: Bench, run: Path, stage: str) -> str:
    """Flip a bit in a part of a finished table; the same command makes the part again."""
    return _damaged(bench, run, stage, flip_byte)


def _damaged(bench: Bench, run: Path, stage: str, damage: Callable[[Path], None]) -> str:
    damage(bench.rng.choice(sorted((run / _TABLES[stage][0]).glob("part-*.parquet"))))
    printed = bench.finish(stage, run)
    return next(line for line in printed.splitlines() if "damaged" in line)


def disk_full(bench: Bench, run: Path, stage: str) -> str:
    """Fill the disk of the run folder in the middle of a stage; later there is space again."""
    return _on_small_disk(bench, run, stage, lambda disk: f"size={(disk.used_bytes() >> 10) + 150}k", "size=256m")


def read_only(bench: Bench, run: Path, stage: str) -> str:
    """Make the run folder read-only; later it is writable again."""
    return _on_small_disk(bench, run, stage, lambda disk: "ro", "rw")


def _on_small_disk(bench: Bench, run: Path, stage: str, fault: Callable[[SmallDisk], str], mended: str) -> str:
    with tmpfs("256m") as disk:
        small = shutil.copytree(run, disk.path / "run")
        disk.remount(fault(disk))
        said = last_line(finish(bench.start(stage, small), 2))
        disk.remount(mended)
        bench.finish(stage, small)
        shutil.copytree(small, run, dirs_exist_ok=True)
    return said


def store_fails(bench: Bench, run: Path, stage: str) -> str:
    """Let a tenth of an object store's answers be 500, 503 or late; repeat the command if it fails."""
    with s3_server() as store:
        environment = bench.cluster.environment | store.env
        # In a separate Ray, whose workers know the store.
        command = (stage, "s3://bucket/run", *bench.options)
        store.set_faults(share=0.1, seed=bench.rng.randrange(1000), stall_s=5)
        began = start(*command, environment=environment)
        printed, _ = began.communicate(timeout=3 * _TIMEOUT_S)
        store.set_faults(share=0)
        if began.returncode == 2:
            finish(start(*command, environment=environment))
        elif began.returncode:
            raise RuntimeError(f"exit code {began.returncode}: {printed[-2000:]}")
        for name, data in store.files("bucket").items():
            path = run / Path(name).relative_to("run")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return f"{store.count_faults()} answers failed; exit code {began.returncode}"


def hostile_corpus(bench: Bench, run: Path, stage: str) -> str:
    """Mix one hostile file into twenty, such as a bomb or a link; the others give the same results as without it."""
    data, clean = run.with_name(f"{run.name}-data"), run.with_name(f"{run.name}-good")
    good, bad = make_hostile_corpus(data, 400)
    for name in good:
        (clean / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(data / name, clean / name)
    shutil.rmtree(run)
    options = ["--preset", "tiny_cpu", *bench.options[bench.options.index("--set") :]]
    for folder, photos in ((clean_of(run), clean), (run, data)):
        bench.finish(stage, folder, *options, "--data", photos)
    refused = json.loads((run / f"{stage}.json").read_text())["refused"]
    if {refusal["image_id"] for refusal in refused} != set(bad):
        raise RuntimeError(f"{len(refused)} were refused, not {len(bad)}")
    return f"refused {len(refused)} of {len(good) + len(bad)}"


def clean_of(run: Path) -> Path:
    """Return the undisturbed run of a fault that needs a separate one."""
    return run.with_name(f"{run.name}-clean")


FAULTS = (
    *(Fault(f"driver killed in {stage}", stage, driver_killed) for stage in WORKERS),
    *(Fault(f"worker killed in {stage}", stage, worker_killed) for stage in WORKERS),
    *(Fault(f"node lost in {stage}", stage, node_lost) for stage in WORKERS),
    *(Fault(f"workers frozen in {stage}", stage, worker_frozen) for stage in ("extract", "train")),
    Fault("second run on the folder", "extract", second_writer),
    *(Fault(f"part truncated, {stage}", stage, part_truncated, is_finished=True) for stage in _TABLES),
    *(Fault(f"bit flipped, {stage}", stage, part_flipped, is_finished=True) for stage in _TABLES),
    Fault("disk full", "labels", disk_full),
    Fault("folder read-only", "labels", read_only),
    Fault("object store: 10 % of answers 500, 503 or late", "extract", store_fails),
    Fault("5 % hostile files", "extract", hostile_corpus),
    Fault("job stopped, submitted again", "extract", job_stopped),
    Fault("head lost, job submitted again", "labels", head_lost),
)
