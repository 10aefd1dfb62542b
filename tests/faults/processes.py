"""Faults of processes and machines: they are killed, lost with their node, stopped, or take all memory."""

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults import hooks
from tests.faults.bench import TIMEOUT_S, WORKERS, Bench, kill, last_line, num_epochs
from tests.faults.cluster import Node

_NUM_LOSSES = 5
# What is free beside others' work must suffice for a process that takes `hooks.HOG_BYTES`.
_ROOM_BYTES = hooks.HOG_BYTES // 2


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
    return last_line(bench.end(process))


def node_lost(bench: Bench, run: Path, stage: str) -> str | None:
    """Kill every process of a working node by SIGKILL; the others continue. A new node replaces it afterwards."""
    process = bench.start(stage, run)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    lost = working_nodes(bench, stage)
    if not lost:
        kill(process)
        return None
    bench.cluster.lose(lost[0])
    return last_line(bench.end(process))


def working_nodes(bench: Bench, stage: str) -> list[Node]:
    """Return the nodes with workers of a stage, but not the head."""
    nodes = [bench.cluster.node_of(pid) for pid in bench.cluster.workers(WORKERS[stage])]
    return [node for node in nodes if node is not None and node is not bench.cluster.nodes[0]]


def node_replaced(after_s: float) -> Callable[[Bench, Path, str], str | None]:
    """Return a fault: a working node is lost, without which the workers have no room, and replaced after a while."""

    def do(bench: Bench, run: Path, stage: str) -> str | None:
        with bench.cluster.occupied(bench.cluster.nodes[0]):
            process = bench.start(stage, run)
            if not bench.wait_until(bench.moment(stage, run), process):
                return None
            lost = working_nodes(bench, stage)
            if len(lost) != len(bench.cluster.nodes) - 1:
                kill(process)
                raise RuntimeError(f"workers on {len(lost)} of the nodes that are free")
            bench.cluster.lose(lost[0])
            try:
                process.wait(timeout=after_s)
            except subprocess.TimeoutExpired:
                bench.cluster.add_node()
            return last_line(bench.end(process))

    return do


def lost_again_and_again(bench: Bench, run: Path, stage: str) -> str | None:
    """Take a worker from a training five times, alternately with its node, which is replaced, and alone."""
    process = bench.start(stage, run)
    before: set[int] = set()
    for loss in range(_NUM_LOSSES):
        # Others have taken their places, and an epoch more is done.
        if not bench.wait_until(partial(_goes_on, bench, run, loss, before), process):
            return None
        before = set(bench.cluster.workers(WORKERS[stage]))
        lost = working_nodes(bench, stage)
        if loss % 2 or not lost:
            _kill_one(bench, stage)
        else:
            bench.cluster.lose(lost[0])
            bench.cluster.add_node()
    return last_line(bench.end(process))


def _goes_on(bench: Bench, run: Path, epochs: int, before: set[int]) -> bool:
    pids = set(bench.cluster.workers(WORKERS["train"]))
    return num_epochs(run) > epochs and len(pids) > 1 and not pids & before


def _kill_one(bench: Bench, stage: str) -> None:
    os.kill(bench.rng.choice(bench.cluster.workers(WORKERS[stage])), signal.SIGKILL)


def dies_after_write(bench: Bench, run: Path, stage: str) -> str | None:
    """Let a worker kill itself by SIGKILL right after it has written a part, before it says so."""
    process = bench.start(stage, run)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    (bench.cluster.faults / hooks.DIE_AFTER_WRITE).touch()
    printed = bench.end(process)
    return last_line(printed) if bench.cluster.claimed(hooks.DIE_AFTER_WRITE) else None


def out_of_memory(bench: Bench, run: Path, stage: str) -> str | None:
    """Let a worker take up to 2 GB on a node whose memory monitor allows less: Ray kills it, as in a node without room.

    Ray's limit is a share of the machine's memory, so it is set a little above what is in use now.
    """
    cluster = bench.cluster
    cluster.lose(cluster.nodes[-1])
    with open("/proc/meminfo") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    limit = (sizes["MemTotal"] - sizes["MemAvailable"] + _ROOM_BYTES) / sizes["MemTotal"]
    greedy = cluster.add_node(
        **{hooks.GREEDY: "1", "RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    )
    try:
        # So that all the work is done on the greedy one.
        with cluster.occupied(cluster.nodes[0]), cluster.occupied(cluster.nodes[1]):
            process = bench.start(stage, run)
            if not bench.wait_until(bench.moment(stage, run), process):
                return None
            (cluster.faults / hooks.FILL_MEMORY).touch()
            printed = bench.end(process)
        claimed = bench.cluster.claimed(hooks.FILL_MEMORY)
        if not claimed:
            return None
        if claimed[0].read_text():
            raise RuntimeError("Ray left the process alone")
        return last_line(printed)
    finally:
        cluster.lose(greedy)


def job_stopped(bench: Bench, run: Path, stage: str) -> str | None:
    """Stop a job by `ray job stop`; the same job, submitted again, continues."""
    if len(bench.cluster.nodes) > 1:
        bench.cluster.restart_alone()
    job = f"stopped-{run.name}"
    process = submit(bench, run, stage, job)
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    bench.end(bench.cluster.stop_job(job))
    said = bench.end(process)
    bench.end(submit(bench, run, stage, f"{job}-again"))
    return last_line(said)


def head_lost(bench: Bench, run: Path, stage: str) -> str | None:
    """Kill the head, and so the job, by SIGKILL; submit the job again to a new cluster at the same address."""
    if len(bench.cluster.nodes) > 1:
        bench.cluster.restart_alone()
    process = submit(bench, run, stage, f"lost-{run.name}")
    if not bench.wait_until(bench.moment(stage, run), process):
        return None
    bench.cluster.restart_alone()
    process.communicate(timeout=TIMEOUT_S)
    return last_line(bench.end(submit(bench, run, stage, f"lost-{run.name}-again")))


def submit(bench: Bench, run: Path, stage: str, job: str) -> subprocess.Popen[str]:
    """Submit a stage by `ray job submit`."""
    root = Path(__file__).resolve().parents[2]
    return bench.cluster.submit("python", f"jobs/{stage}.py", str(run), working_dir=root, job=job)
