"""A small action that is repeated in the background."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(action: Callable[[], None], *, seconds: float, name: str, once_more: bool = False) -> Iterator[None]:
    """Call `action` every few seconds in a thread of its own, until the context ends.

    Args:
        action: must catch its own errors: an exception ends the thread.
        seconds: time between two calls, and before the first.
        name: name of the thread.
        once_more: also call `action` when the context ends.
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
