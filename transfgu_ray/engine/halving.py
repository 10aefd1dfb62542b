"""Halving of batches that do not fit into GPU memory."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def halved(run: Callable[[Tensor], Made], batch: Tensor, count: Callable[[], None]) -> Iterator[Made]:
    """Yield `run(batch)`, or the results of its halves in order, halved further until each fits into GPU memory.

    Args:
        run: accepts any number of items.
        batch: (n, ...), n > 0.
        count: called each time that a batch is halved.

    Raises:
        torch.OutOfMemoryError: a single item does not fit.
    """
    try:
        yield run(batch)
        return
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Outside the handler: its traceback keeps the tensors of the failed forward pass alive.
    torch.cuda.empty_cache()
    count()
    half = len(batch) // 2
    yield from halved(run, batch[:half], count)
    yield from halved(run, batch[half:], count)
