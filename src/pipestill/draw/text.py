"""Timelines of traces and tables of schedules for terminals."""

from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest
from math import ceil, floor, log10

from pipestill.draw.boxes import INSTANT, LEGEND, ROUNDING, Box, Unit, Work, boxes_in, scale, typical_seconds, window
from pipestill.schedule.action import Action, Op
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.structure import Structure
from pipestill.schedule.trace import Trace

_Style = tuple[Work, int] | None
"""What a cell of a terminal shows: work and the parity of its step, or None for idle."""


def text(
    trace: Trace,
    *,
    width: int = 100,
    start: float | None = None,
    end: float | None = None,
    colour: bool = False,
    unit: Unit = "s",
) -> str:
    """Draw a timeline for terminals: one line for each rank, time to the right, then an axis and a legend.

        rank 0 |t0t1F0F1......B0--B1--|
        rank 1 |..t0t1F0F1B0--B1--U...|
                0         5         10 s

    Shows `start` to `end` in seconds of the trace's clock (default: two steady steps, or everything when there are
    none); the axis counts from `start`. Ranks' lines are at most `width` columns, or 20 cells where that is wider.
    Numbers are microbatches, or blocks in blockwise training. A box that is too narrow for its number shows its letter only, and
    one shorter than half a column may vanish. `colour` adds ANSI escape codes. Raises `ConfigError` for an empty trace or window.
    """
    start, end = window(trace, 2, start, end)
    boxes = list(boxes_in(trace, start, end))
    head = len(f"rank {trace.num_ranks - 1}")
    num_cells, cell_seconds = _grid(boxes, end - start, max(20, width - head - 3))
    numbered = {letter for letter, seconds in typical_seconds(boxes).items() if seconds >= 1.99 * cell_seconds}
    rows = [
        _cells([b for b in boxes if b.rank == rank], num_cells, cell_seconds, numbered, " " if colour else "-")
        for rank in range(trace.num_ranks)
    ]
    lines = []
    for rank, cells in enumerate(rows):
        runs = groupby(cells, lambda cell: cell[1])
        line = "".join(_painted("".join(c for c, _ in run), style, colour) for style, run in runs)
        lines.append(f"{f'rank {rank}':<{head}} |{line}|\n")
    shown = {style[0] for cells in rows for _, style in cells if style}
    legend = [f"{_painted(w.letter, (w, 0), colour)} {w.name}" for w in LEGEND if w in shown]
    indent = " " * (head + 2)
    axis = _axis_line(num_cells, cell_seconds, max(num_cells, width - head - 2), unit)
    return f"{''.join(lines)}{indent}{axis}\n{indent}{'  '.join([*legend, '. idle'])}\n"


def schedule_table(schedule: Schedule[Structure], *, transfers: bool = False) -> str:
    """Write the rows of one period without times: one line for each rank, one column for each position in its row.

        rank 0 | F0 t1@1 B0 U
        rank 1 | F0 L0   B0 U t0@1

    `t1@1` is work for the step after the period's own. With `transfers`, reads of the data are shown as well,
    `F0>1` sends the result of F0 to rank 1, and `F0<1` posts its receive from there. In blockwise training:

        rank 0 | T0.0 B0.0 R0.0 U0.0
        rank 1 | T0.1 T1   B0.1 R0.1 U0.1 B1 U1

    Block 0 has several shares, and `B0.1` is the student's step of its share 1.
    """
    rows = [
        [_name(a, schedule.structure) for a in row if transfers or (a.computes and a.op is not Op.DATA)] for row in schedule.rows
    ]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    head = len(f"rank {len(rows) - 1}")
    lines = []
    for rank, row in enumerate(rows):
        cells = " ".join(f"{label:<{width}}" for label, width in zip(row, widths, strict=False))
        lines.append(f"{f'rank {rank}':<{head}} | {cells}".rstrip() + "\n")
    return "".join(lines)


def _name(action: Action, structure: Structure) -> str:
    """The name of an action in a table: `F0`, `t1@1` (one step ahead), `F0>1` (sent to rank 1)."""
    step = f"@{action.step}" if action.step else ""
    peer = "" if action.peer is None else f"{action.kind.value}{action.peer}"
    return f"{structure.label(action)}{step}{peer}"


def _grid(boxes: Sequence[Box], span: float, num_cells: int) -> tuple[int, float]:
    """Choose how many cells a line has, at most `num_cells`, and how many seconds each of them is.

    Where forwards and backwards take multiples of some time (as they do under uniform costs), a cell is a whole part
    of that time, so that equal work gets equally many cells.
    """
    typical = typical_seconds(boxes).values()
    for parts in range(1, 5 if typical else 1):
        quantum = min(typical) / parts
        cells_each = floor(num_cells * quantum / span + ROUNDING)
        if cells_each and all(abs(t / quantum - round(t / quantum)) < 0.1 for t in typical):
            return ceil(span * cells_each / quantum - ROUNDING), quantum / cells_each
    return num_cells, span / num_cells


def _cells(
    boxes: Iterable[Box], num_cells: int, cell_seconds: float, numbered: set[str], filling: str
) -> list[tuple[str, _Style]]:
    """The cells of one rank's line: a box gets those whose middle it covers, and shows its number if it is `numbered` work."""
    cells: list[tuple[str, _Style]] = [(".", None)] * num_cells
    for box in boxes:
        first, after = (floor(t / cell_seconds + 0.5 - ROUNDING) for t in (box.start, box.end))
        letter, style = box.work.letter, (box.work, box.step % 2)
        label = f"{letter}{box.number}" if letter in numbered else letter
        if len(label) > after - first:
            label = letter
        if first < after:
            cells[first:after] = [(c, style) for c in label.ljust(after - first, filling)]
        elif letter == INSTANT and first < num_cells and cells[first][1] is None:
            cells[first] = (letter, style)  # until the next box wants the cell
    return cells


def _painted(cells: str, style: _Style, colour: bool) -> str:
    """Cells of one style, with escape codes around them if `colour` is on."""
    if not colour:
        return cells
    if style is None:
        return f"\x1b[2m{cells}\x1b[0m"
    work, parity = style
    ink = {"black": 16, "white": 231}[work.inks[parity]]
    return f"\x1b[38;5;{ink};48;5;{work.terminal_colours[parity]}m{cells}\x1b[0m"


def _axis_line(num_cells: int, cell_seconds: float, width: int, unit: Unit) -> str:
    """The axis: round times, each written from the cell that starts then, and the unit after the last one."""
    factor, symbol = scale(num_cells * cell_seconds, unit)
    least = 8 * cell_seconds * factor
    power = 10.0 ** floor(log10(least))
    tick = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - ROUNDING))
    decimals = max(0, -floor(log10(tick) + ROUNDING))
    line = ""
    for i in range(ceil(num_cells * cell_seconds * factor / tick - ROUNDING)):
        longer = line.ljust(round(i * tick / factor / cell_seconds)) + f"{i * tick:.{decimals}f}"
        if i and len(f"{longer} {symbol}") > width:
            break
        line = longer
    return f"{line} {symbol}"
