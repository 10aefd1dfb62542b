"""Work done slightly ahead of its use, in a fixed order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from transfgu_ray.engine.session import READER_CPUS, Resources
from transfgu_ray.errors import StorageError

T = TypeVar("T")
_READ_RETRIES = 3


def num_readers(resources: Resources, *, students: int = 1, trainings: int = 1) -> int:
    """Return the reading tasks of each student in each worker: all together at most one per core, but each at least 1.

    Args:
        resources: of each training.
        students: number that learn side by side in each worker.
        trainings: number that run at once on the cores.
    """
    return max(1, resources.num_cores // (resources.train_workers * students * trainings))


def read_ahead(read: Callable[..., T], calls: Iterable[Mapping[str, Any]], num_ahead: int) -> Iterator[T]:
    """Yield `read(**call)` for each call, computed by Ray tasks, in the order of the calls.

    Args:
        read: a plain function.
        calls: keyword arguments of each call; consumed as tasks are started.
        num_ahead: tasks running or finished ahead of the one whose result is wanted.
    """
    import ray

    task: Any = ray.remote(read).options(
        num_cpus=READER_CPUS,
        scheduling_strategy="DEFAULT",
        max_retries=_READ_RETRIES,
        # Of the task's own errors, those that pass.
        retry_exceptions=[StorageError],
    )
    finish: Callable[[Any], T] = ray.get
    yield from in_order((task.remote(**call) for call in calls), finish, num_ahead)


def to_device(parts: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Join parts into a batch on the device; a copy, as Ray's arrays are read-only, through pinned memory for CUDA."""
    batch = torch.from_numpy(np.concatenate(parts))
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


Item = TypeVar("Item")
Made = TypeVar("Made")
Begun = TypeVar("Begun")


def in_order(begun: Iterable[Begun], finish: Callable[[Begun], Made], num_ahead: int) -> Iterator[Made]:
    """Yield `finish(work)` for each item of `begun`, in order; taking an item from `begun` starts its work.

    Args:
        begun: futures, references or the like; consumed as work is started.
        finish: waits for one item and returns its result.
        num_ahead: items running or finished ahead of the one whose result is wanted.
    """
    waiting: deque[Begun] = deque()
    for work in begun:
        waiting.append(work)
        if len(waiting) > num_ahead:
            yield finish(waiting.popleft())
    while waiting:
        yield finish(waiting.popleft())


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item], num_threads: int) -> Iterator[Made]:
    """Yield `make(item)` for each item, in order; threads make the next ones while the caller uses the last.

    At most `num_threads` + 1 results wait at a time, so memory is bounded however many items there are. An error in
    `make` is raised where its result is asked for. Meant for work that releases the GIL, such as decoding and resizing.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        yield from in_order((pool.submit(make, item) for item in items), Future.result, num_threads)
