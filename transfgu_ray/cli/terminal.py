"""Progress and closing lines in the terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transfgu_ray.engine.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task

# Seconds between two lines where there is no terminal: long stages show life, quick ones stay short.
_MOST_S = 30
_LEAST_S = 5


def printable(text: str) -> str:
    """Return text with control characters, such as file names may hold, as visible escapes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _lines(text: str) -> str:
    """Return text as `printable` does, but keep its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def duration(seconds: float) -> str:
    """Return a duration in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _pace(task: "Task") -> str:
    """Return how far a stage is, its rate, the time left, and how many items were refused."""
    parts = [f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}"] if task.total else []
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


class _Shown(Progress):
    """One stage on a console."""

    def __init__(self, console: "Console", name: str, unit: str) -> None:
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        class Pace(ProgressColumn):
            """Redrawn between updates too, so that the time left counts down."""

            def render(self, task: "Task") -> Text:
                return Text(_pace(task), no_wrap=True, overflow="ellipsis")

        self._console, self._name, self._unit = console, name, unit
        self._is_live = console.is_terminal
        columns = (TextColumn(f"{name:<9}"), BarColumn(bar_width=16), Pace())
        self._bars = Bars(*columns, console=console, disable=not self._is_live)
        self._number = self._bars.add_task(name, total=None, unit=unit, words="", refused=0)
        self._task = self._bars.tasks[0]
        self._shown_at, self._tenths_shown = time.monotonic(), 0

    def __enter__(self) -> "_Shown":
        self._bars.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._bars.stop()
        if self._is_live or kind is not None:
            return
        task, total = self._task, self._task.total
        counted = f", {task.completed:.0f} of {total:.0f} {self._unit}" if total else ""
        refused = f", {task.fields['refused']} refused" if task.fields["refused"] else ""
        self._log(f"{self._name}: done{counted} in {duration(task.elapsed or 0)}{refused}")

    def expect(self, total: int) -> None:
        self._bars.update(self._number, total=total)
        if total == 1:
            plural = "es" if self._unit == "passes" else "s"
            self._unit = self._task.fields["unit"] = self._unit.removesuffix(plural)
        if not self._is_live:
            self._log(f"{self._name}: {total} {self._unit}")

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        task = self._task
        self._bars.update(self._number, advance=done, words=words, refused=task.fields["refused"] + refused)
        if self._is_live or not task.total or task.completed >= task.total:
            return
        tenths, waited = int(10 * task.completed / task.total), time.monotonic() - self._shown_at
        if waited >= _MOST_S or (tenths > self._tenths_shown and waited >= _LEAST_S):
            self._log(f"{self._name}: {_pace(task)}")
            self._shown_at, self._tenths_shown = time.monotonic(), tenths

    def _log(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


class Terminal:
    """Progress and closing lines on stderr and stdout; plain lines where there is no terminal."""

    def __init__(self, quiet: bool, verbose: bool = False) -> None:
        from rich.console import Console

        self._quiet = quiet
        self._out = Console(highlight=False, soft_wrap=True)
        self._progress = Console(stderr=True, highlight=False)
        if verbose:
            self._show_log()

    def _show_log(self) -> None:
        """Show what is logged, from now on, above the progress."""
        import logging

        from transfgu_ray.runs.logs import LogFormatter, logger

        console = self._progress

        class Shown(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                console.print(_lines(self.format(record)), markup=False, soft_wrap=True)

        handler = Shown()
        handler.setFormatter(LogFormatter())
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Progress]:
        """Show one stage while it runs: one live line, or without a terminal a line every tenth or half a minute.

        Args:
            name: of the stage.
            total: items to do; None until the stage says so.
            unit: what they are, in the plural.
        """
        if self._quiet:
            yield Progress()
            return
        with _Shown(self._progress, name, unit) as shown:
            if total is not None:
                shown.expect(total)
            yield shown

    def note(self, text: str) -> None:
        """Print one line, unless quiet."""
        if not self._quiet:
            self._out.print(_lines(text), markup=False)

    def table(self, rows: list[list[str]], header: list[str], words: tuple[int, ...] = ()) -> None:
        """Print a small table, unless quiet.

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
                # In a narrow terminal words wrap, never numbers.
                column.no_wrap = True
        for row in rows:
            table.add_row(*(Text(_lines(cell)) for cell in row))
        if not self._quiet:
            self._out.print(table)
