"""Small actions in the background, and how they end what the main thread does."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Not SIGINT, which processes started with `&` in a shell script ignore, nor SIGUSR1, whose handler Ray Tune replaces.
_WAKE = signal.SIGUSR2


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


@contextmanager
def interruptible() -> Iterator[Callable[[Exception], None]]:
    """Yield a function with which another thread ends the body by an exception; the first one given is raised.

    A real signal is sent, since nothing else wakes a main thread that waits for a lock, and its handler raises
    KeyboardInterrupt, since Ray's waits let no other exception through. A body that swallows it is ended when it
    returns. A body outside the main thread cannot be woken at all. May be nested.
    """
    main = threading.main_thread()
    given: list[Exception] = []

    def interrupt(error: Exception) -> None:
        given.append(error)
        if is_main and main.ident is not None:
            signal.pthread_kill(main.ident, _WAKE)

    is_main = threading.current_thread() is main
    before = signal.signal(_WAKE, signal.default_int_handler) if is_main else None
    try:
        yield interrupt
    except BaseException:
        if not given:
            raise
    finally:
        if is_main:
            # None stands for a handler set by C code, which Python cannot restore.
            signal.signal(_WAKE, before or signal.SIG_DFL)
    if given:
        raise given[0] from None
