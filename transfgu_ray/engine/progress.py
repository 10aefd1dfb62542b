"""How stages tell whoever started them how far they are."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

# Takes the number of items that were done since the last call, and by name how many of them were refused.
Progress = Callable[..., None]


class Reporter(Protocol):
    """What the pipeline tells whoever started it."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[..., None]]:
        """Progress of one stage: the context gives a `stream.Progress`."""

    def note(self, text: str) -> None:
        """Says one line."""


class SilentReporter:
    """A reporter for processes that nobody watches."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Shows nothing."""
        yield lambda more, words="", refused=0: None

    def note(self, text: str) -> None:
        """Says nothing."""
