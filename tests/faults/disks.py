"""Faults of storage: damaged, full, read-only, away or hostile."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.faults.bench import NUM_PHOTOS, TABLES, TIMEOUT_S, Bench, clean_of, last_line, start
from tests.faults.hostile import make_hostile_corpus
from tests.faults.storage import SmallDisk, flip_byte, s3_server, tmpfs, truncate
from tests.faults.stutter import AWAY, SCHEME

# A command that waits longer for a storage has no end in sight.
_GIVES_UP_S = 300


def part_truncated(bench: Bench, run: Path, stage: str) -> str:
    """Cut a part of a finished table in half; the same command makes the part again."""
    return _damaged(bench, run, stage, truncate)


def part_flipped(bench: Bench, run: Path, stage: str) -> str:
    """Flip a bit in a part of a finished table; the same command makes the part again."""
    return _damaged(bench, run, stage, flip_byte)


def _damaged(bench: Bench, run: Path, stage: str, damage: Callable[[Path], None]) -> str:
    damage(bench.rng.choice(sorted((run / TABLES[stage][0]).glob("part-*.parquet"))))
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
        said = last_line(bench.end(bench.start(stage, small), 2))
        disk.remount(mended)
        bench.finish(stage, small)
        shutil.copytree(small, run, dirs_exist_ok=True)
    return said


def disk_away(seconds: float | None) -> Callable[[Bench, Path, str], str | None]:
    """Return a fault: the disk of run and photographs does not answer for a while (None: until the command ends)."""

    def do(bench: Bench, run: Path, stage: str) -> str | None:
        away = bench.cluster.faults / AWAY
        command = (stage, f"{SCHEME}://{run}", *bench.options, "--data", f"{SCHEME}://{bench.photos}")
        if stage == "extract":
            shutil.rmtree(run)
        process = bench.start(*command)
        if not bench.wait_until(bench.moment(stage, run), process):
            return None
        return _while_away(bench, process, (away.touch, away.unlink), seconds, again=lambda: bench.start(*command))

    return do


def store_away(seconds: float | None) -> Callable[[Bench, Path, str], str | None]:
    """Return a fault: the object store answers nothing but 500 and 503 for a while (None: until the command ends)."""

    def do(bench: Bench, run: Path, stage: str) -> str | None:
        with s3_server() as store:
            # In a separate Ray, whose workers know the store.
            command = (stage, "s3://bucket/run", *bench.options)

            def begin() -> subprocess.Popen[str]:
                return start(*command, environment=bench.cluster.environment | store.env)

            parts = bench.rng.randint(NUM_PHOTOS // 10, NUM_PHOTOS // 2)
            process = begin()
            if not bench.wait_until(lambda: store.count(f"bucket/run/{TABLES[stage][0]}") >= parts, process):
                return None
            switch = (lambda: store.set_faults(share=1), lambda: store.set_faults(share=0))
            said = _while_away(bench, process, switch, seconds, again=begin)
            store.copy_to("bucket", "run", run)
            return said

    return do


def _while_away(
    bench: Bench,
    process: subprocess.Popen[str],
    switch: tuple[Callable[[], object], Callable[[], object]],
    seconds: float | None,
    *,
    again: Callable[[], subprocess.Popen[str]],
) -> str:
    """Switch a storage off and, after a while, on; where it stays away the command gives up and is repeated."""
    off, on = switch
    off()
    try:
        if seconds is None:
            printed = bench.end(process, 2, timeout=_GIVES_UP_S)
        else:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
    finally:
        on()
    if seconds is not None:
        return last_line(bench.end(process))
    bench.end(again())
    if "Traceback" in printed or not last_line(printed).startswith("transfgu: "):
        raise RuntimeError(f"not one sentence: {printed[-2000:]}")
    return last_line(printed)


def store_fails(bench: Bench, run: Path, stage: str) -> str:
    """Let a tenth of an object store's answers be 500, 503 or late; repeat the command if it fails."""
    with s3_server() as store:
        environment = bench.cluster.environment | store.env
        # In a separate Ray, whose workers know the store.
        command = (stage, "s3://bucket/run", *bench.options)
        store.set_faults(share=0.1, seed=bench.rng.randrange(1000), stall_s=5)
        began = start(*command, environment=environment)
        bench.end(began, 0, 2, timeout=3 * TIMEOUT_S)
        store.set_faults(share=0)
        if began.returncode == 2:
            bench.end(start(*command, environment=environment))
        store.copy_to("bucket", "run", run)
        return f"{store.count_faults()} answers failed; exit code {began.returncode}"


def hostile_corpus(bench: Bench, run: Path, stage: str) -> str:
    """Mix one hostile file into twenty, such as a bomb or a link; the others give the same results as without it."""
    data, clean = run.with_name(f"{run.name}-data"), run.with_name(f"{run.name}-good")
    good, bad = make_hostile_corpus(data, 400)
    for name in good:
        (clean / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(data / name, clean / name)
    shutil.rmtree(run)
    for folder, photos in ((clean_of(run), clean), (run, data)):
        bench.finish(stage, folder, *bench.settings, "--data", photos)
    refused = json.loads((run / f"{stage}.json").read_text())["refused"]
    if {refusal["image_id"] for refusal in refused} != set(bad):
        raise RuntimeError(f"{len(refused)} were refused, not {len(bad)}")
    return f"refused {len(refused)} of {len(good) + len(bad)}"
