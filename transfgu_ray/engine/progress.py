"""How work tells whoever started it how far it is."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress:
    """How far one piece of work is. This one keeps it to itself; subclasses show it."""

    def expect(self, total: int) -> None:
        """Say how many items there are to do, once that is known."""

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        """Count items that were done since the last call; 0 of them is a sign of life.

        Args:
            done: items done, refused ones among them.
            words: to show beside the numbers.
            refused: how many of the items were refused.
        """


class Heartbeat(Progress):
    """Passes on that something was done, but not what: for work that is no part of what is counted."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        """Give a sign of life."""
        self._progress()


class Reporter(Protocol):
    """What work is shown on: a terminal, or nothing."""

    def stage(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Progress]:
        """Show one piece of work while it runs.

        Args:
            name: what it is called.
            total: items to do; None where the work will say so itself.
            unit: what the items are, in the plural.
        """

    def note(self, text: str) -> None:
        """Say one line."""


class SilentReporter:
    """A reporter for processes that nobody watches."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Progress]:
        """Show nothing."""
        yield Progress()

    def note(self, text: str) -> None:
        """Say nothing."""
