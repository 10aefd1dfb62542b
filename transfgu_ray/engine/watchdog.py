"""A stage that does nothing for too long ends with an error that names it, instead of waiting for ever."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transfgu_ray.background import repeated
from transfgu_ray.engine.progress import Progress
from transfgu_ray.errors import StalledError

# Not SIGINT, which is ignored in what a shell script starts with `&`. Its handler raises what Ctrl-C does: Ray's own
# waits let nothing else through.
_WAKE = signal.SIGUSR1


@contextmanager
def unless_stalled(doing: str, minutes: float, progress: Progress) -> Iterator[Progress]:
    """Gives `progress` back, to be called whenever something was done; interrupts the main thread when that stays away.

    Ray itself notices dead processes and starts them again; what it waits for in silence is a process that lives but
    does nothing, and room in a cluster that has lost a node. A trial of a sweep, which is no main thread, is not
    watched: the sweep that waits for it is.

    Args:
        doing: what is watched, e.g. `stage extract`.
        minutes: `runtime.stall_minutes`.
        progress: takes what was done.

    Raises:
        StalledError: nothing was done for so long.
    """
    main = threading.main_thread()
    main_id = main.ident
    if threading.current_thread() is not main or main_id is None:
        yield progress
        return
    noted, is_stalled = _Noted(progress), False

    def watch() -> None:
        nonlocal is_stalled
        if not is_stalled and time.monotonic() - noted.last > 60 * minutes:
            is_stalled = True
            # A real signal: nothing less wakes a main thread that waits for a lock.
            signal.pthread_kill(main_id, _WAKE)

    before = signal.signal(_WAKE, signal.default_int_handler)
    try:
        with repeated(watch, seconds=min(60 * minutes / 4, 1.0), name="watchdog"):
            yield noted
    except KeyboardInterrupt:
        if not is_stalled:
            raise
        raise StalledError(
            f"{doing} did nothing for {minutes:g} minutes and was stopped; `ray status` tells what the cluster lacks, "
            "the same command goes on from here, and runtime.stall_minutes sets the patience"
        ) from None
    finally:
        # None stands for a handler of C code, which Python cannot put back.
        signal.signal(_WAKE, before or signal.SIG_DFL)


class _Noted(Progress):
    """Passes progress on, and remembers when there last was some."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.last = time.monotonic()

    def expect(self, total: int) -> None:
        self.last = time.monotonic()
        self._progress.expect(total)

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        self.last = time.monotonic()
        self._progress(done, words, refused=refused)
