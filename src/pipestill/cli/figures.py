"""Figures for a person: in words, in tables and in paragraphs."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def shown_bytes(num_bytes: float) -> str:
    """Write a number of bytes for a person, in units of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:#.3g} {unit}" if num_bytes < 99.95 * size else f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def milliseconds(seconds: float) -> str:
    """Write seconds as milliseconds: three digits, and all of them from 100 on."""
    return f"{seconds * 1e3:#.3g}" if seconds < 0.0995 else f"{seconds * 1e3:.0f}"


def counted(number: int, thing: str) -> str:
    """Write a number of things: 1 device, 2 devices."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


_NO_END = 1_000  # columns of a file


class FigureTable:
    """A table of figures behind a column of names.

    Args:
        names: titles of the columns
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a name with its figures."""
        self._rows.append(cells)

    def show(self, console: Console) -> None:
        """Print the table. Where a terminal has no room for all columns, they are in several tables of about as many."""
        room = console.width if console.is_terminal else _NO_END
        count = len(self._names) - 1
        for parts in range(1, count + 1):
            tables = [range(1 + count * i // parts, 1 + count * (i + 1) // parts) for i in range(parts)]
            if max(map(self._width, tables)) <= room:
                break
        for columns in tables:
            wide = Console(width=self._width(columns), force_terminal=console.is_terminal)
            with wide.capture() as lines:
                wide.print(self._table(columns))
            show_line(console, lines.get().rstrip("\n"))

    def _width(self, columns: Sequence[int]) -> int:
        return Console(width=_NO_END).measure(self._table(columns)).maximum

    def _table(self, columns: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
        table.add_column(self._names[0], no_wrap=True)
        for column in columns:
            table.add_column(self._names[column], justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(row[0], *(row[column] for column in columns))
        return table


def say(console: Console, text: str) -> None:
    """Print prose, wrapped between words on a terminal, and as long lines elsewhere."""
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def show_line(console: Console, line: str) -> None:
    """Print a line in one piece, such as a command to be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
