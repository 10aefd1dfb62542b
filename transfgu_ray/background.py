"""Small actions in the background, and how they end what the main thread does."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Not SIGINT, which processes started with `&` in a shell script ignore, nor SIGUSR1, whose handler Ray Tune replaces.
_WAKE = signal.SIGUSR2
# What schedulers, `ray job stop` and people end a command with.
_STOPS = (signal.SIGTERM, signal.SIGINT)
# Seconds after which something must have swallowed an interrupt.
_AGAIN_S = 2.0
# Schedulers kill what has not ended half a minute after SIGTERM.
_CLOSING_S = 10.0


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
    before = signal.signal(_WAKE, _interrupt) if is_main else None
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


def _interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, unless one is ending the main thread already: what closes must not be ended itself."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    raise KeyboardInterrupt


@dataclass
class Stop:
    """A stop by a signal.

    Attributes:
        by: the first of the signals that came; None = none.
        is_over: whether the body has ended.
        known: set as soon as `by` is final.
    """

    by: int | None = None
    is_over: bool = False
    known: threading.Event = field(default_factory=threading.Event)


@contextmanager
def stoppable(stop: Stop, last_words: str) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the body of the main thread by KeyboardInterrupt, and the process in any case.

    Python runs its own handlers only between two steps of Python, libraries replace them, and what they raise may be
    swallowed. So a thread reads the signals too, interrupts the body until it ends, and ends the process where closing
    takes too long. Signals after the first change nothing. What a parent ignores, such as SIGINT of a process started
    with `&`, stays ignored.

    Args:
        stop: is told of the signal.
        last_words: printed to stderr where the process has to be ended; the exit code is 128 + the signal.
    """

    def interrupt(number: int, _: object) -> None:
        stop.by = stop.by or number
        _interrupt()

    caught = [number for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {_WAKE: signal.signal(_WAKE, _interrupt)} | {each: signal.signal(each, interrupt) for each in caught}
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    woke_before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(stop, hears, last_words), daemon=True, name="stop").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woke_before)
        # The thread still reads what came before.
        tells.close()
        stop.known.wait()
        stop.is_over = True
        for number, handler in before.items():
            signal.signal(number, handler if stop.by is None else signal.SIG_IGN)


def _listen(stop: Stop, hears: socket.socket, last_words: str) -> None:
    """Wait for a signal that stops the process, or for the end of the body; see to it that a stop succeeds."""
    # A process that starts Ray points its stderr elsewhere for the moment.
    stderr = os.dup(2)
    while (number := hears.recv(1)) and number[0] not in _STOPS:
        pass
    if number:
        stop.by = stop.by or number[0]
    stop.known.set()
    end = time.monotonic() + _CLOSING_S
    while stop.by is not None:
        time.sleep(_AGAIN_S)
        if time.monotonic() > end:
            os.write(stderr, f"{last_words}\n".encode())
            os._exit(128 + stop.by)
        if not stop.is_over:
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
    hears.close()
    os.close(stderr)
