"""Seconds and bytes of teacher blocks and their student blocks at several row counts, and CSV files of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipestill.costs import Link
from pipestill.errors import ConfigError, PlanError, nearest

_PER_POINT = {"rows": "rows", "teacher_forward_seconds": "teacher_seconds", "student_step_seconds": "student_seconds"}
_REQUIRED = ("block", *_PER_POINT, "input_bytes_per_row", "parameter_bytes")
_MEMORY = ("teacher_bytes", "state_bytes", "activation_bytes_per_row")
_OPTIONAL = ("name", *_MEMORY, "relative_standard_error")
_PER_BLOCK = ("input_bytes_per_row", "parameter_bytes", *_OPTIONAL)
_ALLREDUCE = re.compile(r"allreduce_([1-9][0-9]*)_seconds")  # the column of groups of so many ranks
_LINK = {"link_latency_seconds": "latency_seconds", "link_bytes_per_second": "bytes_per_second"}
_SERVER = Link(latency_seconds=20e-6, bytes_per_second=10e9)
_UNREAD = -1  # the block of a line that does not say its block
_SHOWN = 20  # of the problems of one file


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """What a teacher block's forward and its student block's step take, measured at each of `rows`.

    `input_bytes_per_row` is what the block receives, `parameter_bytes` what an all-reduce of the student's gradients
    moves. Of the memory, `teacher_bytes` is the teacher block's parameters and buffers, `state_bytes` the student
    block's parameters, gradients and optimizer state together, `activation_bytes_per_row` what a student step holds at
    its peak for each row. `relative_standard_error` is that of the least certain point; 0 where it is not known.

    `allreduce_seconds` is by how much a student's step took longer in a group of each of `allreduce_ranks` ranks, that add
    up their gradients, than where each rank is by itself; empty where it was not measured.
    """

    name: str
    rows: tuple[int, ...]
    teacher_seconds: tuple[float, ...]
    student_seconds: tuple[float, ...]
    input_bytes_per_row: int
    parameter_bytes: int
    teacher_bytes: int = 0
    state_bytes: int = 0
    activation_bytes_per_row: int = 0
    relative_standard_error: float = 0.0
    allreduce_ranks: tuple[int, ...] = ()
    allreduce_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises `PlanError` when points are missing, out of order or negative."""
        problems = []
        if not self.rows:
            problems.append("no measured point; expected at least one")
        elif self.rows[0] < 1 or any(after <= before for before, after in zip(self.rows, self.rows[1:], strict=False)):
            problems.append(f"rows are {list(self.rows)}, expected ascending counts from 1")
        for role in ("teacher_seconds", "student_seconds"):
            seconds = getattr(self, role)
            if len(seconds) != len(self.rows):
                problems.append(f"{len(self.rows)} row counts with {len(seconds)} {role}; expected as many")
            problems += [f"{role} holds {s}, expected 0 or more" for s in seconds if not 0 <= s < float("inf")]
        for name in ("input_bytes_per_row", "parameter_bytes", *_MEMORY, "relative_standard_error"):
            amount = getattr(self, name)
            if not 0 <= amount < float("inf"):
                problems.append(f"{name} is {amount}, expected 0 or more")
        groups = self.allreduce_ranks
        if len(groups) != len(self.allreduce_seconds):
            problems.append(f"{len(groups)} sizes of groups with {len(self.allreduce_seconds)} allreduce_seconds")
        if any(size <= before for before, size in pairwise((1, *groups))):
            problems.append(f"allreduce_ranks are {list(groups)}, expected ascending sizes from 2")
        problems += [
            f"allreduce_seconds holds {s}, expected 0 or more"
            for s in self.allreduce_seconds
            if not 0 <= s < float("inf")
        ]
        if problems:
            raise PlanError(f"times of block '{self.name}': {'; '.join(problems)}")

    def teacher(self, rows: float) -> float:
        """Seconds of the teacher block's forward of `rows` rows; between measured points a straight line.

        Outside of them the nearest two points' line goes on, though never below 0; one point alone is taken as
        proportional. No rows cost nothing.
        """
        return _on_the_line(rows, self.rows, self.teacher_seconds)

    def student(self, rows: float) -> float:
        """Seconds of the student block's step (forward, backward, update) of `rows` rows; lines as in `teacher`."""
        return _on_the_line(rows, self.rows, self.student_seconds)


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """All blocks in order, the links between ranks and, if known, the rows of a whole batch.

    Unless something else is said, links are those of a server with several GPUs: 10 GB/s after 20 microseconds. A file
    holds the blocks, and the links where they were measured; it does not hold the rows of a batch.
    """

    blocks: tuple[BlockTimes, ...]
    link: Link = _SERVER
    batch: int | None = None

    def __post_init__(self) -> None:
        """Raises `PlanError` when there is no block, or a batch has no rows."""
        problems = [] if self.blocks else ["no block; expected at least one"]
        if self.batch is not None and self.batch < 1:
            problems.append(f"a batch of {self.batch} rows; expected at least 1")
        groups = {block.allreduce_ranks: block.name for block in self.blocks}
        if len(groups) > 1:
            shown = ", ".join(f"{list(sizes)} in block '{name}'" for sizes, name in groups.items())
            problems.append(f"all-reduces are measured for groups of {shown}; expected the same sizes in all blocks")
        if problems:
            raise PlanError(f"block profile: {'; '.join(problems)}")

    @property
    def memory_known(self) -> bool:
        """Whether the blocks say what they hold in memory."""
        return any(getattr(block, column) for block in self.blocks for column in _MEMORY)

    def output_bytes_per_row(self, block: int) -> int:
        """What a row takes behind a teacher block; the last one's outputs are taken to be as large as its inputs."""
        return self.blocks[min(block + 1, len(self.blocks) - 1)].input_bytes_per_row

    def allreduce_seconds(self, block: int, k: int) -> float:
        """An all-reduce of the student block's gradients over k ranks, none for one.

        As measured, on a straight line between measured sizes of groups; above the largest it grows with the 2 (k - 1)
        messages of a ring. Where nothing was measured, what a ring takes (Pipe-BD, Jang et al., DATE 2023).
        """
        if k == 1:
            return 0.0
        sizes, seconds = self.blocks[block].allreduce_ranks, self.blocks[block].allreduce_seconds
        if sizes:
            most = sizes[-1]
            return seconds[-1] * (k - 1) / (most - 1) if k > most else _on_the_line(k, (1, *sizes), (0.0, *seconds))
        moved = 2 * (k - 1) / k * self.blocks[block].parameter_bytes
        return moved / self.link.bytes_per_second + 2 * (k - 1) * self.link.latency_seconds

    def relay_seconds(self, block: int, batch: float, k: int) -> float:
        """One of k ranks receives its share of the block's input (Pipe-BD, though that charges the whole batch for any k)."""
        return self.link.seconds(self.blocks[block].input_bytes_per_row * (batch / k))

    def scaled(self, factor: float, *, transfers: bool = False) -> BlockProfile:
        """Every piece of work `factor` times as long, and with `transfers` also links and measured all-reduces."""
        slower = factor if transfers else 1.0
        blocks = [
            dataclasses.replace(
                block,
                teacher_seconds=tuple(s * factor for s in block.teacher_seconds),
                student_seconds=tuple(s * factor for s in block.student_seconds),
                allreduce_seconds=tuple(s * slower for s in block.allreduce_seconds),
            )
            for block in self.blocks
        ]
        was = self.link
        link = Link(was.latency_seconds * slower, was.bytes_per_second / slower, was.wake_seconds * slower)
        return dataclasses.replace(self, blocks=tuple(blocks), link=link)

    def with_link(self, link: Link) -> BlockProfile:
        """The same blocks with other links, from which all-reduces follow too."""
        return dataclasses.replace(self.with_allreduces((), [()] * len(self.blocks)), link=link)

    def with_allreduces(self, ranks: Sequence[int], seconds: Sequence[Sequence[float]]) -> BlockProfile:
        """What groups of each of `ranks` took for an all-reduce of each block."""
        blocks = [
            dataclasses.replace(block, allreduce_ranks=tuple(ranks), allreduce_seconds=tuple(mine))
            for block, mine in zip(self.blocks, seconds, strict=True)
        ]
        return dataclasses.replace(self, blocks=tuple(blocks))

    @classmethod
    def load(cls, path: str | Path) -> BlockProfile:
        """Read a CSV file, one line for each block and row count; `ConfigError` lists what is wrong in it.

        Columns: block (from 0), rows, teacher_forward_seconds, student_step_seconds, input_bytes_per_row,
        parameter_bytes, and optionally the other fields of `BlockTimes` (of all-reduces allreduce_2_seconds for groups of
        two ranks, and so on), and link_latency_seconds with link_bytes_per_second (as in `save`).
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"cannot read block profile '{path}': {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"block profile '{path}' is not text: {error}") from None
        problems: list[str] = []
        try:
            blocks, link = _read(text, problems)
        except csv.Error as error:
            problems.append(f"not CSV: {error}")
        if problems:
            shown = problems[:_SHOWN]
            if len(problems) > _SHOWN:
                shown.append(f"and {len(problems) - _SHOWN} more")
            raise ConfigError(f"block profile '{path}':\n  " + "\n  ".join(shown))
        return cls(tuple(blocks), link)

    def save(self, path: str | Path) -> None:
        """Write what `load` reads; optional columns only where they say something, such as how fast links really are."""
        defaults = {item.name: item.default for item in dataclasses.fields(BlockTimes)}
        used = [c for c in _OPTIONAL[1:] if any(getattr(block, c) != defaults[c] for block in self.blocks)]
        if any(block.name != _name(index) for index, block in enumerate(self.blocks)):
            used.insert(0, "name")
        columns = [*_REQUIRED, *used]
        sizes = self.blocks[0].allreduce_ranks
        allreduces = [f"allreduce_{size}_seconds" for size in sizes]
        measured = self.link.latency_seconds > 0 and self.link.bytes_per_second < float("inf") and self.link != _SERVER
        link = {column: getattr(self.link, name) for column, name in _LINK.items()} if measured else {}
        try:
            with Path(path).open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow([*columns, *allreduces, *link])
                for index, block in enumerate(self.blocks):
                    constant = [getattr(block, column) for column in columns[1 + len(_PER_POINT) :]]
                    constant += block.allreduce_seconds
                    for point in zip(*(getattr(block, name) for name in _PER_POINT.values()), strict=True):
                        writer.writerow([index, *point, *constant, *link.values()])
        except OSError as error:
            raise ConfigError(f"cannot write block profile '{path}': {error.strerror}") from None


def _on_the_line(rows: float, measured: Sequence[int], seconds: Sequence[float]) -> float:
    if rows == 0:
        return 0.0
    if len(measured) == 1:
        return seconds[0] * (rows / measured[0])
    after = min(max(bisect_left(measured, rows), 1), len(measured) - 1)
    if measured[after] == rows:
        return seconds[after]
    before = after - 1
    slope = (seconds[after] - seconds[before]) / (measured[after] - measured[before])
    return max(0.0, seconds[before] + (rows - measured[before]) * slope)


def _name(block: int) -> str:
    return f"block {block}"


def _read(text: str, problems: list[str]) -> tuple[list[BlockTimes], Link]:
    """The blocks and the links of a CSV text; adds what is wrong to `problems`, and then returns no block."""
    reader = csv.reader(io.StringIO(text), strict=True)
    header = [column.strip() for column in next(reader, [])]
    known = (*_REQUIRED, *_OPTIONAL, *_LINK)
    problems += [f"column '{c}' is missing" for c in _REQUIRED if c not in header]
    groups = [c for c in header if _ALLREDUCE.fullmatch(c)]
    problems += [f"no column '{c}' is known{nearest(c, known)}" for c in header if c not in (*known, *groups)]
    problems += [f"column '{c}' is of groups of one rank, expected two or more" for c in groups if _size(c) < 2]
    problems += [f"column '{c}' is there {count} times" for c, count in Counter(header).items() if count > 1]
    if problems:
        optional = ", ".join((*_OPTIONAL, "allreduce_2_seconds and so on", *_LINK))
        problems.append(f"columns are {', '.join(_REQUIRED)}; optional ones {optional}")
        return [], _SERVER
    lines: dict[int, list[dict[str, Any]]] = {}
    for cells in filter(None, reader):
        wrong, values = _values(header, cells)
        problems += [f"line {reader.line_num}: {problem}" for problem in wrong]
        lines.setdefault(values.get("block", _UNREAD), []).append(values)
    if not lines and not problems:
        problems.append("no line follows the header; expected one for each block and row count")
    if _UNREAD not in lines and sorted(lines) != list(range(len(lines))):
        problems.append(
            f"blocks are {', '.join(map(str, sorted(lines)))}; expected 0 to {len(lines) - 1} without a gap"
        )
    link = _link(header, [values for points in lines.values() for values in points], problems)
    lines.pop(_UNREAD, None)
    for block, points in sorted(lines.items()):
        for column in (*(c for c in _PER_BLOCK if c in header), *groups):
            different = {point[column]: None for point in points if column in point}  # in the order of the lines
            if len(different) > 1:
                shown = " and ".join(map(str, different))
                problems.append(f"block {block}: {column} is {shown}, expected the same in all its lines")
        counts = Counter(point["rows"] for point in points if "rows" in point)
        problems += [f"block {block}: {count} lines for {rows} rows" for rows, count in counts.items() if count > 1]
    return [] if problems else [_times(block, points) for block, points in sorted(lines.items())], link


def _size(column: str) -> int:
    """Of the groups that a column of all-reduces is about."""
    found = _ALLREDUCE.fullmatch(column)
    assert found is not None
    return int(found[1])


def _link(header: Sequence[str], points: list[dict[str, Any]], problems: list[str]) -> Link:
    """What all lines say of the links."""
    given = [column for column in _LINK if column in header]
    found = {column: {point[column]: None for point in points if column in point} for column in given}
    if given and len(given) < len(_LINK):
        problems.append(f"column '{given[0]}' is there alone; expected both or none of {' and '.join(_LINK)}")
    for column, different in found.items():
        if len(different) > 1:
            problems.append(f"{column} is {' and '.join(map(str, different))}, expected the same in all lines")
    if problems or not given:
        return _SERVER
    return Link(**{_LINK[column]: next(iter(different)) for column, different in found.items()})


def _values(header: Sequence[str], cells: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """What is wrong in a line, and the values that can be read."""
    if len(cells) != len(header):
        return [f"{len(cells)} cells, the header has {len(header)}"], {}
    problems: list[str] = []
    values: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        if column == "name":
            values[column] = cell
            continue
        whole = not column.endswith(("_seconds", "_second", "_error"))
        least = 1 if column in ("rows", "link_bytes_per_second") else 0
        try:
            value = int(cell) if whole else float(cell)
        except ValueError:
            problems.append(f"{column} is '{cell}', expected a {'whole ' if whole else ''}number")
            continue
        if least <= value < float("inf"):
            values[column] = value
        else:
            problems.append(f"{column} is {cell}, expected {least} or more")
    return problems, values


def _times(block: int, points: list[dict[str, Any]]) -> BlockTimes:
    points = sorted(points, key=lambda point: int(point["rows"]))
    constant = {column: points[0][column] for column in _PER_BLOCK if column in points[0]}
    measured = {name: tuple(point[column] for point in points) for column, name in _PER_POINT.items()}
    groups = sorted(((_size(c), seconds) for c, seconds in points[0].items() if _ALLREDUCE.fullmatch(c)))
    reduced = {"allreduce_ranks": tuple(k for k, _ in groups), "allreduce_seconds": tuple(s for _, s in groups)}
    return BlockTimes(**{"name": _name(block), **constant, **measured, **reduced})
