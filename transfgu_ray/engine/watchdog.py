"""A watchdog that ends a stalled stage with an error that names it, instead of letting it wait for ever."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from transfgu_ray.background import interruptible, repeated
from transfgu_ray.engine.progress import Progress
from transfgu_ray.errors import StalledError

_AGAIN_S = 30.0


@contextmanager
def unless_stalled(
    doing: str, minutes: float, progress: Progress, parts: Callable[[], Mapping[str, float]] = dict
) -> Iterator[Progress]:
    """Yield a `progress` to call whenever something is done; interrupt the main thread if it is not called in time.

    Ray itself restarts dead processes, but waits silently for a process that is alive and does nothing, and for free
    resources in a cluster that has lost a node. A trial of a sweep does not run in the main thread and is not watched
    here; the sweep watches it as one of its parts.

    Args:
        doing: name of the work, e.g. `stage extract`.
        minutes: `runtime.stall_minutes`.
        progress: receives every call.
        parts: tells the seconds since each part of the work, by its name, did something; each must, by itself.

    Raises:
        StalledError: nothing was done for that long, in the whole or in a part.
    """
    if threading.current_thread() is not threading.main_thread():
        yield progress
        return
    noted = _Noted(progress)
    with interruptible() as interrupt:
        woken_at = -_AGAIN_S

        def watch() -> None:
            nonlocal woken_at
            now, ages = time.monotonic(), parts()
            noted.last = max([noted.last, *(now - age for age in ages.values())])
            late = [name for name, age in ages.items() if age > 60 * minutes]
            late += [doing] if now - noted.last > 60 * minutes else []
            # Again a little later, should something have swallowed it.
            if late and now - woken_at > _AGAIN_S:
                woken_at = now
                interrupt(_stalled(doing, late[0], minutes))

        with repeated(watch, seconds=min(60 * minutes / 4, 1.0), name="watchdog"):
            yield noted


def _stalled(doing: str, late: str, minutes: float) -> StalledError:
    subject = f"{doing} did nothing for {minutes:g} minutes and"
    if late != doing:
        subject = f"{late} did nothing for {minutes:g} minutes, so {doing}"
    return StalledError(
        f"{subject} was stopped; `ray status` shows what the cluster lacks, the same command resumes from here, and "
        "runtime.stall_minutes sets this limit"
    )


class _Noted(Progress):
    """A progress that passes calls on and remembers the time of the last one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.last = time.monotonic()

    def expect(self, total: int) -> None:
        self.last = time.monotonic()
        self._progress.expect(total)

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        self.last = time.monotonic()
        self._progress(done, words, refused=refused)
