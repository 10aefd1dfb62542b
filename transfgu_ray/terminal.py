"""Progress and closing lines in the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    """A line break, an escape sequence or the like, as names of files may hold, as the letters that stand for it."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _lines(text: str) -> str:
    """`printable`, but for line breaks."""
    return "\n".join(map(printable, text.split("\n")))


class Terminal:
    """Progress and closing lines on stderr and stdout; plain lines where there is no terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._quiet = quiet
        self._out = Console(highlight=False, soft_wrap=True)
        self._progress = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Shows one stage while it runs; gives a function that takes items done, and words to show beside them."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self._quiet:
            yield lambda more, words="": None
            return
        if not self._progress.is_terminal:
            done = 0

            def count(more: int, words: str = "") -> None:
                nonlocal done
                done += more

            self._progress.print(f"{name}: {total} {unit}")
            yield count
            self._progress.print(f"{name}: done, {done} of {total} {unit}")
            return
        columns = (
            TextColumn(f"{name:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[words]}"),
        )  # fmt: skip
        with Progress(*columns, console=self._progress) as progress:
            task = progress.add_task(name, total=total, words="")
            yield lambda more, words="": progress.update(task, advance=more, words=words)

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
