"""Signs of life that workers anywhere in the cluster give while they work, gathered on a board for whoever waits.

Ray hands results to the driver a block at a time, which may be hours of work. So workers say themselves that they go
on; what has to be done twice, after a restart, is no sign of life.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from transfgu_ray.background import repeated

_NAME = "transfgu_ray signs of life"
_EVERY_S = 2.0
_ANSWER_S = 20.0
# The board of the current job: an actor ends with the handle that made it.
_held: dict[str, Any] = {}


@dataclass(frozen=True)
class Failure:
    """What ended a worker.

    Attributes:
        kind: class of the exception.
        words: its message.
        same: equal for failures that count as the same.
        limit: how often this may happen in a row before it is final; None = it never is.
        times: how often it has happened.
    """

    kind: str
    words: str
    same: tuple[Any, ...]
    limit: int | None
    times: int = 1

    @property
    def is_final(self) -> bool:
        """Return whether it would only happen again."""
        return self.limit is not None and self.times >= self.limit

    def again(self, before: "Failure | None") -> "Failure":
        """Count it with what ended the same worker before, if that was the same."""
        return self if before is None or before.same != self.same else replace(self, times=before.times + 1)


@dataclass
class _Work:
    """What a board knows of a piece of work: when it went on, how often, how far it is, what it said, what failed."""

    at: float
    signs: int = 0
    furthest: tuple[int, ...] = ()
    words: Mapping[str, float] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)


class Board:
    """The last sign of life of each piece of work. Times are this process's own: no clocks are compared."""

    def __init__(self) -> None:
        self._works: dict[str, _Work] = {}
        self._ended: set[str] = set()

    def begin(self, key: str) -> None:
        """Expect signs of a piece of work from now on, which may have ended before."""
        self._ended.discard(key)
        self._works.setdefault(key, _Work(0.0)).at = time.monotonic()

    def sign(self, key: str, position: tuple[int, ...], words: Mapping[str, float]) -> None:
        """Note a sign, unless the work has been as far before.

        Args:
            key: of the work.
            position: how far it is, e.g. (epoch, step); () where nothing is ever done twice.
            words: numbers to show.
        """
        # The processes of a stopped trial die a little later.
        if key in self._ended:
            return
        work = self._works.setdefault(key, _Work(time.monotonic()))
        if position and position <= work.furthest:
            return
        work.at, work.signs = time.monotonic(), work.signs + 1
        work.furthest, work.words = max(position, work.furthest), words

    def read(self, key: str) -> tuple[int, Mapping[str, float]]:
        """Return the number of signs of a piece of work, and what it said last."""
        work = self._works.get(key) or _Work(0.0)
        return work.signs, work.words

    def fail(self, key: str, rank: int, failure: Failure) -> None:
        """Note what ended a worker; each worker counts its own, as the others fail with it."""
        failures = self._works.setdefault(key, _Work(time.monotonic())).failures
        failures[rank] = failure.again(failures.get(rank))

    def final_failure(self, key: str) -> Failure | None:
        """Return a failure that another start would only repeat."""
        failures = self._works[key].failures if key in self._works else {}
        return next((each for each in failures.values() if each.is_final), None)

    def ages(self) -> dict[str, float]:
        """Return the seconds since the last sign of each piece of work."""
        return {key: time.monotonic() - work.at for key, work in self._works.items()}

    def forget(self, keys: Iterable[str]) -> None:
        """Drop pieces of work that have ended, and what is still said of them."""
        for key in keys:
            self._works.pop(key, None)
            self._ended.add(key)


class Sign:
    """A function to call after each step of a piece of work, in whatever process; most calls cost nothing.

    Signs get lost where no board is, and while it is restarted on another node.

    Args:
        key: of the work.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._given = -_EVERY_S

    def __call__(self, *position: int, **words: float) -> None:
        """Give a sign, unless the last one was a moment ago; see `Board.sign`."""
        import ray

        if time.monotonic() - self._given < _EVERY_S or not ray.is_initialized():
            return
        self._given = time.monotonic()
        try:
            board: Any = ray.get_actor(_NAME)
            board.sign.remote(self.key, position, words)
        except (ValueError, ray.exceptions.RayError):
            # No board.
            return

    def begin(self) -> None:
        """Let the board expect signs from now on."""
        _ask("begin", self.key)

    def fail(self, rank: int, failure: Failure) -> None:
        """Note what ended a worker; returns once that is known."""
        import ray

        with suppress(ValueError, ray.exceptions.RayError):
            ray.get(ray.get_actor(_NAME).fail.remote(self.key, rank, failure), timeout=_ANSWER_S)

    def final_failure(self) -> Failure | None:
        """Return a failure that another start would only repeat; None without one, or without a board."""
        import ray

        try:
            board: Any = ray.get_actor(_NAME)
            found: Failure | None = ray.get(board.final_failure.remote(self.key), timeout=_ANSWER_S)
        except (ValueError, ray.exceptions.RayError):
            return None
        return found


def board() -> Any:
    """Return the board of this Ray job; the first call makes it, and it lives as long as the process of that call."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    if job not in _held:
        made: Any = ray.remote(Board).options(name=_NAME, get_if_exists=True, num_cpus=0, max_restarts=-1)
        _held.clear()
        _held[job] = made.remote()
    return _held[job]


def ages(prefix: str) -> dict[str, float]:
    """Return the seconds since the last sign of each piece of work whose key begins so; none if the board is away."""
    found: dict[str, float] = _ask("ages") or {}
    return {key.removeprefix(prefix): age for key, age in found.items() if key.startswith(prefix)}


def _ask(method: str, *arguments: Any) -> Any:
    """Call a method of the board; return None while it is away, or if Ray is."""
    import ray

    # A call would start another Ray.
    if not ray.is_initialized():
        return None
    try:
        return ray.get(getattr(board(), method).remote(*arguments), timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        # One that is being restarted comes back by itself.
        if isinstance(error, ray.exceptions.ActorDiedError):
            _held.clear()
        return None


@contextmanager
def signs_of_life(on_sign: Callable[[Mapping[str, float]], None], key: str | None = None) -> Iterator[Sign]:
    """Yield a sign for workers to give, and call `on_sign` with its words, in a thread, whenever one has been given.

    Args:
        on_sign: must be quick, and catch its own errors.
        key: of work that goes on in another process after this one has been lost, and must not repeat itself; whoever
            chose it lets the board forget it. None = the work ends with the context.
    """
    import ray

    sign, seen = Sign(key or uuid.uuid4().hex), 0 if key is None else None
    board()

    def look() -> None:
        nonlocal seen
        if (found := _ask("read", sign.key)) is None:
            return
        number, words = found
        # What an earlier process did is no news; a restarted board counts from 0.
        if seen is not None and number and number != seen:
            on_sign(words)
        seen = number

    try:
        with repeated(look, seconds=_EVERY_S / 2, name="signs of life"):
            yield sign
    finally:
        if key is None and ray.is_initialized():
            board().forget.remote([sign.key])
