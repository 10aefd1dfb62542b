"""Work done a little ahead of its use, in a fixed order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from transfgu_ray.engine.session import READER_CPUS

T = TypeVar("T")


def read_ahead(read: Callable[..., T], calls: Iterable[Mapping[str, Any]], num_ahead: int) -> Iterator[T]:
    """What `read(**call)` gives of each call, computed by Ray's tasks, in the order of the calls.

    Args:
        read: a plain function.
        calls: its arguments; taken as tasks are started.
        num_ahead: tasks that run, or wait with their results, beside the one whose result is wanted.
    """
    import ray

    task: Any = ray.remote(read).options(num_cpus=READER_CPUS, scheduling_strategy="DEFAULT", max_retries=3)
    finish: Callable[[Any], T] = ray.get
    yield from in_order((task.remote(**call) for call in calls), finish, num_ahead)


def to_device(parts: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """A batch from its parts; copied, since Ray's arrays are read-only, and from pinned memory where it pays."""
    batch = torch.from_numpy(np.concatenate(parts))
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


Item = TypeVar("Item")
Made = TypeVar("Made")
Begun = TypeVar("Begun")


def in_order(begun: Iterable[Begun], finish: Callable[[Begun], Made], num_ahead: int) -> Iterator[Made]:
    """`finish(work)` of each work in order, where taking a work from `begun` begins it.

    Args:
        begun: futures, references or the like; taken as they are begun.
        finish: waits for one.
        num_ahead: how many run, or wait with their results, beside the one whose result is wanted.
    """
    waiting: deque[Begun] = deque()
    for work in begun:
        waiting.append(work)
        if len(waiting) > num_ahead:
            yield finish(waiting.popleft())
    while waiting:
        yield finish(waiting.popleft())


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item], num_threads: int) -> Iterator[Made]:
    """`make(item)` of each item in order; threads make the next ones while the caller works on the last.

    At most `num_threads` + 1 results wait at a time, so memory is bounded however many items there are. What `make`
    raises is raised where its result is asked for. For work that leaves the interpreter lock: decoding and resizing.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        yield from in_order((pool.submit(make, item) for item in items), Future.result, num_threads)
