"""Work on the CPU done ahead of its use, while the encoder runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item], num_threads: int) -> Iterator[Made]:
    """`make(item)` of each item in order; threads make the next ones while the caller works on the last.

    At most `num_threads` + 1 results wait at a time, so memory is bounded however many items there are. What `make`
    raises is raised where its result is asked for. For work that leaves the interpreter lock: decoding and resizing.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
