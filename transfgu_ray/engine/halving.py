"""A batch that a GPU has no memory for, in halves."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def halved(run: Callable[[Tensor], Made], batch: Tensor, count: Callable[[], None]) -> Iterator[Made]:
    """`run(batch)`, or in order that of its halves, their halves and so on where CUDA has no memory for the whole.

    Args:
        run: of any number of items.
        batch: (n, ...), n > 0.
        count: called each time a batch is halved.

    Raises:
        torch.OutOfMemoryError: a single item does not fit.
    """
    try:
        yield run(batch)
        return
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Not in the handler: its traceback holds what the failed forward had made.
    torch.cuda.empty_cache()
    count()
    half = len(batch) // 2
    yield from halved(run, batch[:half], count)
    yield from halved(run, batch[half:], count)
