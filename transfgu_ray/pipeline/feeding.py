"""What feeds a training: plain reading tasks a little ahead of it, in a fixed order.

Not Ray Data: the loop of its executor would run in the training process, whose interpreter lock it holds most of the
time while it waits for batches to be taken.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from transfgu_ray.pipeline.ahead import in_order
from transfgu_ray.pipeline.session import READER_CPUS

T = TypeVar("T")


def read_ahead(read: Callable[..., T], calls: Iterable[tuple[Any, ...]], num_ahead: int) -> Iterator[T]:
    """What `read(*call)` gives of each call, computed by Ray's tasks, in the order of the calls.

    Args:
        read: a plain function.
        calls: its arguments; taken as tasks are started.
        num_ahead: tasks that run, or wait with their results, beside the one whose result is wanted.
    """
    import ray

    task = ray.remote(read).options(num_cpus=READER_CPUS, scheduling_strategy="DEFAULT", max_retries=3)
    yield from in_order((task.remote(*call) for call in calls), ray.get, num_ahead)


def to_device(parts: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """A batch from its parts; copied, since Ray's arrays are read-only, and from pinned memory where it pays."""
    batch = torch.from_numpy(np.concatenate(parts))
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch
