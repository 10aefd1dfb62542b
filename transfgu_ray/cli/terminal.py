"""Progress and closing lines in the terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Task

# Between two lines of a log, s: a job shows life, and quick stages stay short.
_MOST_S = 30
_LEAST_S = 5


def printable(text: str) -> str:
    """A line break, an escape sequence or the like, as names of files may hold, as the letters that stand for it."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _lines(text: str) -> str:
    """`printable`, but for line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _pace(task: "Task") -> str:
    """How far a stage is, how fast, how long it still takes, and how much of it was refused."""
    parts = [f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}"]
    if task.finished:
        parts.append(duration(task.finished_time or 0))
    elif task.speed and task.time_remaining is not None:
        rate = f"{task.speed:.1f}/s" if task.speed >= 1 else f"{60 * task.speed:.1f}/min"
        parts += [rate, f"{duration(task.time_remaining)} left"]
    if task.fields["refused"]:
        parts.append(f"{task.fields['refused']} refused")
    if task.fields["words"]:
        parts.append(task.fields["words"])
    return ", ".join(parts)


class Terminal:
    """Progress and closing lines on stderr and stdout; plain lines where there is no terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._quiet = quiet
        self._out = Console(highlight=False, soft_wrap=True)
        self._progress = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Shows one stage while it runs: one live line, or in a log a line every tenth or half a minute.

        Args:
            name: of the stage.
            total: items to do.
            unit: what they are, in the plural.

        Yields:
            A function that takes items done, words to show beside them, and how many of the items were refused.
        """
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        if self._quiet:
            yield lambda more, words="", refused=0: None
            return

        class Pace(ProgressColumn):
            """Drawn anew between updates too, so that the time left goes down."""

            def render(self, task: "Task") -> Text:
                return Text(_pace(task), no_wrap=True, overflow="ellipsis")

        is_live = self._progress.is_terminal
        columns = (TextColumn(f"{name:<9}"), BarColumn(bar_width=16), Pace())
        with Progress(*columns, console=self._progress, disable=not is_live) as progress:
            number = progress.add_task(name, total=total, unit=unit, words="", refused=0)
            task = progress.tasks[0]
            shown_at, tenths_shown = time.monotonic(), 0

            def count(more: int, words: str = "", refused: int = 0) -> None:
                nonlocal shown_at, tenths_shown
                progress.update(number, advance=more, words=words, refused=task.fields["refused"] + refused)
                tenths, waited = int(10 * task.completed / max(total, 1)), time.monotonic() - shown_at
                is_due = waited >= _MOST_S or (tenths > tenths_shown and waited >= _LEAST_S)
                if is_due and not is_live and task.completed < total:
                    self._log(f"{name}: {_pace(task)}")
                    shown_at, tenths_shown = time.monotonic(), tenths

            if not is_live:
                self._log(f"{name}: {total} {unit}")
            yield count
            if not is_live:
                refusals = f", {task.fields['refused']} refused" if task.fields["refused"] else ""
                took = duration(task.elapsed or 0)
                self._log(f"{name}: done, {task.completed:.0f} of {total} {unit} in {took}{refusals}")

    def _log(self, text: str) -> None:
        self._progress.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Prints one line, unless quiet."""
        if not self._quiet:
            self._out.print(_lines(text), markup=False)

    def table(self, rows: list[list[str]], header: list[str], words: tuple[int, ...] = ()) -> None:
        """Prints a small table, unless quiet.

        Args:
            rows: cells, the first column words.
            header: names of the columns.
            words: further columns that hold words, not figures.
        """
        from rich.table import Table
        from rich.text import Text

        # As text: a class may be named like rich's markup.
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in header:
            table.add_column(Text(_lines(name)))
        for i, column in enumerate(table.columns):
            if i and i not in words:
                column.justify = "right"
                # In a narrow terminal it is words that wrap: a number in two lines is no number.
                column.no_wrap = True
        for row in rows:
            table.add_row(*(Text(_lines(cell)) for cell in row))
        if not self._quiet:
            self._out.print(table)
