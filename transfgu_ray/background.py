"""Something small that is done again and again beside the work."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(action: Callable[[], None], *, seconds: float, name: str, once_more: bool = False) -> Iterator[None]:
    """Call `action` every so many seconds in a thread of its own, until the context ends.

    Args:
        action: should catch what may go wrong: an exception ends the thread.
        seconds: between two calls; the first comes after so long.
        name: of the thread.
        once_more: also call it when the context ends.
    """
    done = threading.Event()

    def work() -> None:
        while not done.wait(seconds):
            action()
        if once_more:
            action()

    thread = threading.Thread(target=work, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
