"""A Ray session, and the number and kind of workers that it can carry."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.cores import usable_cores
from transfgu_ray.engine.logs import divert_ray_loggers, diverted_prints
from transfgu_ray.engine.start import connect, import_ray, is_started_here, shut_down, start_ray
from transfgu_ray.errors import ConfigError, StalledError
from transfgu_ray.runs.logs import begin_work

# A worker and the reading task that feeds it share one CPU, so that one CPU is enough to make progress.
WORKER_CPUS = 0.75
READER_CPUS = 0.25
_POLL_S = 1.0


@dataclass(frozen=True)
class Resources:
    """The resources of a stage.

    Attributes:
        num_cores: CPUs of the machine or cluster.
        num_workers: actors per stage.
        train_workers: Ray Train workers.
        device: "cpu" or "cuda".
        threads: torch and FAISS threads per worker.
        num_blocks: Ray Data blocks; None = one per part, at most 1000.
        in_process: whether units run in threads of this process instead of Ray's.
    """

    num_cores: int
    num_workers: int
    train_workers: int
    device: str
    threads: int
    num_blocks: int | None
    in_process: bool = False

    @property
    def gpus_per_worker(self) -> int:
        """Return the number of GPUs that each actor requests."""
        return 1 if self.device == "cuda" else 0


@contextmanager
def ray_session(
    address: str | None,
    runtime: RuntimeConfig,
    dashboard: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Resources]:
    """Connect to the Ray cluster at `address`, or start a local one on loopback and stop it afterwards.

    Inside another session this one only counts its resources. Where a cluster has no GPU but cuda is asked for, its
    autoscaler is asked for GPUs until the session ends, and the session begins with the first of them.

    Args:
        address: of a cluster; None = start a local one.
        runtime: workers and devices.
        dashboard: start the local one with its dashboard. Without it, the resources of a training inside a stopped
            trial are never freed: Ray Train asks the dashboard whether its controller is alive.
        note: called with a line on the workers of the session, and with one before it waits for a GPU.

    Raises:
        ConfigError: no cluster answers at `address`, Ray does not start here, or a local Ray has too little of what
            was asked for, and never will.
        StalledError: no GPU came within `runtime.stall_minutes`.
    """
    is_local = address in (None, "local")
    import_ray(runtime, is_local=is_local)
    import ray

    if ray.is_initialized():
        begin_work()
        # The outer session has seen a GPU; they may be gone for the moment, with a node that is being replaced.
        yield _resources(runtime, may_lack_gpus=True)
        return
    if is_local:
        start_ray(runtime, dashboard=dashboard)
    else:
        connect(str(address))
    divert_ray_loggers()
    begin_work()
    try:
        with diverted_prints(), nullcontext() if is_local else _awaited_gpus(runtime, note):
            resources = _resources(runtime)
            _require_room(resources, runtime, note)
            note(_words(resources, runtime, is_local=is_local))
            yield resources
    finally:
        shut_down()


@contextmanager
def _awaited_gpus(runtime: RuntimeConfig, note: Callable[[str], None]) -> Iterator[None]:
    """Wait for the first GPU of a cluster that has none; ask its autoscaler for GPUs until the context ends.

    Raises:
        StalledError: none came in time.
    """
    if runtime.device != "cuda" or _granted().get("GPU"):
        yield
        return
    from ray.autoscaler.sdk import request_resources

    wanted = max(runtime.num_workers or 1, runtime.train_workers or 1)
    minutes = runtime.stall_minutes
    note(
        f"waiting at most {minutes:g} minutes for a GPU, since this Ray has none; its autoscaler is asked for {wanted}"
    )
    # Without an autoscaler nobody reads the request.
    request_resources(bundles=[{"GPU": 1}] * wanted)
    try:
        end = time.monotonic() + 60 * minutes
        while not _granted().get("GPU"):
            if time.monotonic() > end:
                raise StalledError(
                    f"runtime.device=cuda waited {minutes:g} minutes for a GPU, but this Ray still has none; `ray "
                    "status` shows what the cluster lacks, and runtime.stall_minutes sets this limit"
                )
            time.sleep(_POLL_S)
        yield
    finally:
        # A cluster that is lost has no request to take back, and Ray raises no narrower class.
        with suppress(Exception):
            request_resources(bundles=[])


def _granted() -> dict[str, float]:
    """Return what all nodes grant together."""
    import ray

    granted: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no types here
    return granted


def _words(resources: Resources, runtime: RuntimeConfig, *, is_local: bool) -> str:
    """Return the line that says on how many workers of which kind stages run."""
    count = f"on {resources.num_workers} worker{'s' if resources.num_workers > 1 else ''}"
    if resources.device == "cuda":
        return f"{count} with a GPU each"
    if runtime.device == "cpu":
        return f"{count}, CPU only: runtime.device=cpu"
    waits = "" if is_local else " (with runtime.device=cuda a run waits for one)"
    return f"{count}, CPU only: this Ray has no GPU{waits}"


def _resources(runtime: RuntimeConfig, may_lack_gpus: bool = False) -> Resources:
    import ray

    total = _granted()
    gpus = int(total.get("GPU", 0))
    if runtime.device == "cuda" and not gpus and not may_lack_gpus:
        raise ConfigError("runtime.device=cuda, but this Ray has no GPU; use auto or cpu")
    device = "cuda" if runtime.device == "cuda" or (gpus and runtime.device == "auto") else "cpu"
    slots = int(total.get("CPU", 1))
    # On one machine slots may outnumber cores, see `ray_session`.
    nodes: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
    cores = max(1, min(slots, usable_cores()) if len(nodes) == 1 else slots)
    # A machine may have more GPUs than cores to feed them.
    gpus = max(min(gpus, _room(total, device)), 1)
    wanted = gpus if device == "cuda" else max(1, cores // runtime.threads)
    return Resources(
        num_cores=cores,
        num_workers=runtime.num_workers or wanted,
        train_workers=runtime.train_workers or (gpus if device == "cuda" else 1),
        device=device,
        threads=runtime.threads,
        num_blocks=runtime.num_blocks,
    )


def _room(total: Mapping[str, float], device: str) -> int:
    """Return how many workers run at once, beside a task that reads for them."""
    by_cpu = int((total.get("CPU", 1) - READER_CPUS) / WORKER_CPUS)
    return min(by_cpu, int(total.get("GPU", 0))) if device == "cuda" else by_cpu


def _require_room(resources: Resources, runtime: RuntimeConfig, note: Callable[[str], None]) -> None:
    """Compare the workers that a configuration asks for with those that Ray has room for.

    On a cluster nodes may come, so that the workers are waited for, and this is said.

    Raises:
        ConfigError: a local Ray never has room for them.
    """
    total = _granted()
    room = _room(total, resources.device)
    asked = {
        "num_workers": runtime.num_workers,
        "min_train_workers" if runtime.min_train_workers else "train_workers": runtime.fewest_train_workers,
    }
    for name, count in asked.items():
        if count is None or count <= room:
            continue
        has = ", ".join(f"{total.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU") if kind in total)
        asks = f"runtime.{name}={count} asks for more workers than the {room} that this Ray has room for ({has})"
        if is_started_here():
            raise ConfigError(f"{asks}, and it stays so small; ask for fewer, or name a cluster by --ray-address")
        note(f"{asks}: what needs them waits until nodes join; `ray status` shows what it lacks")


def granted_by_node() -> list[Mapping[str, float]]:
    """Return what Ray grants on each node that is there; it lists only what there is of each."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
    return [node["Resources"] for node in nodes if node["Alive"]]


def own_node() -> Mapping[str, float]:
    """Return what Ray grants on the node of this process; outside Ray, the cores and GPUs that the process may use."""
    import ray

    if ray.is_initialized():
        own = ray.get_runtime_context().get_node_id()
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
        granted: dict[str, float] = next(node["Resources"] for node in nodes if node["NodeID"] == own)
        return granted
    import torch

    return {"CPU": usable_cores(), "GPU": torch.cuda.device_count()}


def cores_per_gpu(node: Mapping[str, float]) -> int:
    """Return the share of a node's cores that each of its GPUs, and so each worker there, gets; at least 1.

    Args:
        node: see `own_node`. Ray lists only what there is of each.
    """
    return max(1, int(node.get("CPU", 0)) // max(1, int(node.get("GPU", 0))))


def num_nodes() -> int:
    """Return the nodes of the cluster that this process is connected to."""
    import ray

    # As Any: Ray annotates no return.
    nodes: Any = ray.nodes
    return sum(1 for node in nodes() if node["Alive"])
