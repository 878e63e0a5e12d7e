"""Timelines of traces as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill.draw.boxes import INSTANT, LEGEND, Box, Unit, Work, boxes_in, scale, summary, typical_seconds, window, write_bytes
from pipestill.errors import ConfigError
from pipestill.schedule.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IDLE: dict[str, Any] = {"facecolor": "#f4f4f4", "edgecolor": "#cfcfcf", "hatch": "////", "linewidth": 0}

_LOOK = {  # on top of Matplotlib's defaults, whatever a user's own matplotlibrc says
    "svg.hashsalt": "pipestill",
    "text.parse_math": False,
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.6,
}

_LEFT = 0.72  # margins and heights of a picture in inches: here the names of ranks stand
_RIGHT = 0.2
_TITLE = 0.32  # above each panel
_GAP = 0.1  # between panels
_FOOT = 0.75  # the axis and the legend
_DIGIT_WIDTH = 0.64  # in font sizes


def picture(traces: Sequence[Trace], path: str | Path, *, titles: Sequence[str], num_steps: int = 2, unit: Unit = "s") -> None:
    """Write the steady state of `traces`, one above the other on one time axis, as SVG or PNG by the suffix of `path`.

    Each starts at 0 on the axis and shows `num_steps` steps (everything, where a trace has no two steps), so the
    shorter one is the faster one. In blockwise training, where a step may be a window of batches, each shows as many batches
    as `num_steps` of the longest windows hold, if it has them. Numbers are microbatches, or blocks in blockwise training; two
    shades of a colour are two steps; hatched is idle. The same traces give the same bytes. Raises `ConfigError` for another
    suffix, an empty trace, a number of titles that is not that of the traces, or a path that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"cannot draw '{path}': the name must end in .svg or .png")
    if not traces or len(titles) != len(traces):
        raise ConfigError(f"{len(titles)} titles for {len(traces)} traces; expected one title for each of at least one")
    if num_steps < 1:
        raise ConfigError(f"a picture of {num_steps} steps; expected at least 1")
    batches = num_steps * max(trace.batches_per_step for trace in traces)
    windows = [window(t, ceil(batches / t.batches_per_step) if t.by_block else num_steps) for t in traces]
    write_bytes(path, _drawn(traces, windows, titles, path.suffix[1:].lower(), unit))


def _drawn(
    traces: Sequence[Trace], windows: Sequence[tuple[float, float]], titles: Sequence[str], suffix: str, unit: Unit
) -> bytes:
    """Draw the picture, and return the bytes of its file."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [list(boxes_in(trace, *window)) for trace, window in zip(traces, windows, strict=True)]
    span = max(end - start for start, end in windows)
    factor, symbol = scale(span, unit)
    shortest = min((s for boxes in panels for s in typical_seconds(boxes).values()), default=span)
    row = 0.2 if max(t.num_ranks for t in traces) > 8 else 0.28
    width = min(16.0, max(9.0, _LEFT + _RIGHT + 0.13 * span / shortest))
    inside = width - _LEFT - _RIGHT
    top = height = _FOOT + sum(_TITLE + row * t.num_ranks for t in traces) + _GAP * (len(traces) - 1)
    with style.context(["default", _LOOK]):
        figure = Figure(figsize=(width, height), dpi=150)
        for i, (trace, boxes, (start, end)) in enumerate(zip(traces, panels, windows, strict=True)):
            top -= _TITLE + row * trace.num_ranks
            axes = figure.add_axes((_LEFT / width, top / height, inside / width, row * trace.num_ranks / height))
            axes.set_xlim(0, span)
            _panel(axes, trace.num_ranks, boxes, end - start, 72 * inside / span, 72 * row, f"trace{i}")
            name = axes.annotate(titles[i], (0, 1), (0, 5), "axes fraction", "offset points", weight="bold", size=10)
            axes.annotate(summary(trace, boxes, end - start, unit), (1, 1), (10, 5), (name, "axes fraction"), "offset points")
            top -= _GAP
        axes.xaxis.set_visible(True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * factor:g}")
        axes.set_xlabel(f"time ({symbol.replace('us', 'µs')})" if unit else symbol)
        used = [w for w in LEGEND if any(b.work is w for boxes in panels for b in boxes)]
        handles = [Patch(facecolor=w.colours[0], label=w.name) for w in used]
        handles.append(Patch(**_IDLE, label="idle"))
        place = (_LEFT / width, 0.06 / height)
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=place, ncols=len(handles))
        buffer = io.BytesIO()
        nameless = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
        figure.savefig(buffer, format=suffix, metadata=nameless)
    return buffer.getvalue()


def _panel(axes: Axes, num_ranks: int, boxes: Sequence[Box], span: float, second: float, row: float, name: str) -> None:
    """Draw boxes on hatched rows, rank 0 on top. A second is `second` points wide and a row `row` points high.

    Every group of like boxes has an id of its own in an SVG, which starts with `name`.
    """
    from matplotlib.collections import PolyCollection

    axes.set_ylim(num_ranks, 0)
    axes.set_yticks([r + 0.5 for r in range(num_ranks)], [f"rank {r}" for r in range(num_ranks)])
    axes.tick_params(left=False, labelsize=8)
    axes.set_frame_on(False)
    axes.xaxis.set_visible(False)

    def fill(gid: str, places: Sequence[tuple[int, float, float]], **look: Any) -> None:
        """Paint the boxes at (rank, start, end) in one look, as one group of the SVG."""
        corners = [[(s, r + 0.06), (e, r + 0.06), (e, r + 0.94), (s, r + 0.94)] for r, s, e in places]
        axes.add_collection(PolyCollection(corners, gid=f"{name}-{gid}", **look), autolim=False)

    fill("idle", [(rank, 0.0, span) for rank in range(num_ranks)], **_IDLE)
    for (work, parity), group in _grouped(boxes).items():
        thin = [min(0.8, 0.1 * b.seconds * second) for b in group]  # a white edge never eats up its box
        edge = ("white", thin) if work.letter != INSTANT else (work.colours[parity], 0.8)
        places = [(b.rank, b.start, b.end) for b in group]
        gid = f"{work.name.replace(' ', '-')}-{parity}"
        fill(gid, places, facecolor=work.colours[parity], edgecolor=edge[0], linewidth=edge[1])
    _write_numbers(axes, boxes, second, row)


def _write_numbers(axes: Axes, boxes: Sequence[Box], second: float, row: float) -> None:
    """Write the numbers of forwards and backwards into the boxes that have room for them, in one size for each kind of work."""
    for letter, typical in typical_seconds(boxes).items():
        numbered = [(b, str(b.number)) for b in boxes if b.work.letter == letter]
        size = min(8.0, 0.6 * row, 0.8 * typical * second / (_DIGIT_WIDTH * max(len(label) for _, label in numbered)))
        for box, label in numbered:
            if size >= 4.5 and _DIGIT_WIDTH * size * len(label) < 0.95 * box.seconds * second:
                ink = box.work.inks[box.step % 2]
                middle = (box.start + box.end) / 2
                axes.text(middle, box.rank + 0.5, label, size=size, color=ink, ha="center", va="center_baseline")


def _grouped(boxes: Iterable[Box]) -> dict[tuple[Work, int], list[Box]]:
    """Group boxes by their work and the parity of their step, in the order in which they are painted."""
    groups: dict[tuple[Work, int], list[Box]] = {(work, parity): [] for work in LEGEND for parity in (0, 1)}
    for box in boxes:
        groups[box.work, box.step % 2].append(box)
    return {key: group for key, group in groups.items() if group}
