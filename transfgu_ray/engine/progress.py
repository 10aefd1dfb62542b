"""Progress reports from a piece of work to its caller."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress:
    """The progress of one piece of work. This class shows nothing; subclasses do."""

    def expect(self, total: int) -> None:
        """Set the number of items to do, once it is known."""

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        """Count items done since the last call; 0 is a sign of life.

        Args:
            done: items done, including refused ones.
            words: text to show beside the numbers.
            refused: how many of the items were refused.
        """


class Heartbeat(Progress):
    """A progress that passes on signs of life but no counts, for work beside the counted items."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        """Give a sign of life."""
        self._progress()


class Reporter(Protocol):
    """Where the progress of stages is shown: a terminal, or nowhere."""

    def stage(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Progress]:
        """Show one piece of work while it runs.

        Args:
            name: the name to show.
            total: items to do; None if the work sets it through `Progress.expect`.
            unit: plural noun for the items.
        """

    def note(self, text: str) -> None:
        """Show one line of text."""


class SilentReporter:
    """A reporter for processes that nobody watches."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Progress]:
        """Show nothing."""
        yield Progress()

    def note(self, text: str) -> None:
        """Show nothing."""
