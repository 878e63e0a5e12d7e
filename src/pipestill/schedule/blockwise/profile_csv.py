"""CSV texts of block profiles: one line for each block and row count, read with all of their problems at once."""

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipestill.errors import nearest

Values = dict[str, Any]
"""Fields of `BlockTimes`, or values of one line by their columns."""

PER_POINT = {"rows": "rows", "teacher_forward_seconds": "teacher_seconds", "student_step_seconds": "student_seconds"}
"""Columns with another value in each line of a block, and the fields that they fill."""
_REQUIRED = ("block", *PER_POINT, "input_bytes_per_row", "parameter_bytes")
MEMORY = ("teacher_bytes", "state_bytes", "activation_bytes_per_row")
_OPTIONAL = ("name", *MEMORY, "relative_standard_error")
_PER_BLOCK = ("input_bytes_per_row", "parameter_bytes", *_OPTIONAL)
_ALLREDUCE = re.compile(r"allreduce_([1-9][0-9]*)_seconds")  # the column of groups of so many ranks
_LINK = {"link_latency_seconds": "latency_seconds", "link_bytes_per_second": "bytes_per_second"}
_UNREAD = -1  # the block of a line that does not say its block


def write(blocks: Sequence[Values], defaults: Values, link: Mapping[str, float]) -> str:
    """The text of blocks and of the link's fields. Optional columns are left out where no block differs from `defaults`."""
    used = [c for c in _OPTIONAL[1:] if any(block[c] != defaults[c] for block in blocks)]
    if any(block["name"] != _name(index) for index, block in enumerate(blocks)):
        used.insert(0, "name")
    columns = [*_REQUIRED, *used]
    allreduces = [f"allreduce_{size}_seconds" for size in blocks[0]["allreduce_ranks"]]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*columns, *allreduces, *(column for column, name in _LINK.items() if name in link)])
    for index, block in enumerate(blocks):
        constant = [block[column] for column in columns[1 + len(PER_POINT) :]]
        constant += block["allreduce_seconds"]
        for point in zip(*(block[name] for name in PER_POINT.values()), strict=True):
            writer.writerow([index, *point, *constant, *(link[name] for name in _LINK.values() if name in link)])
    return file.getvalue()


def read(text: str, problems: list[str]) -> tuple[list[Values], Values]:
    """The fields of every block and of the link (none where the text says nothing of it).

    What is wrong is added to `problems`, and then there are no blocks.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    header = [column.strip() for column in next(reader, [])]
    problems += _header_problems(header)
    if problems:
        return [], {}
    lines: dict[int, list[Values]] = {}  # by block
    for cells in filter(None, reader):
        wrong, values = _values(header, cells)
        problems += [f"line {reader.line_num}: {problem}" for problem in wrong]
        lines.setdefault(values.get("block", _UNREAD), []).append(values)
    if not lines and not problems:
        problems.append("no line follows the header; expected one for each block and row count")
    if _UNREAD not in lines and sorted(lines) != list(range(len(lines))):
        problems.append(f"blocks are {', '.join(map(str, sorted(lines)))}; expected 0 to {len(lines) - 1} without a gap")
    link = _link(header, [values for points in lines.values() for values in points], problems)
    lines.pop(_UNREAD, None)
    for block, points in sorted(lines.items()):
        problems += [f"block {block}: {problem}" for problem in _block_problems(header, points)]
    return [] if problems else [_fields(block, points) for block, points in sorted(lines.items())], link


def _header_problems(header: Sequence[str]) -> list[str]:
    """Columns that are missing, unknown or there twice."""
    known = (*_REQUIRED, *_OPTIONAL, *_LINK)
    groups = [c for c in header if _ALLREDUCE.fullmatch(c)]
    problems = [f"column '{c}' is missing" for c in _REQUIRED if c not in header]
    problems += [f"no column '{c}' is known{nearest(c, known)}" for c in header if c not in (*known, *groups)]
    problems += [f"column '{c}' is of groups of one rank, expected two or more" for c in groups if _size(c) < 2]
    problems += [f"column '{c}' is there {count} times" for c, count in Counter(header).items() if count > 1]
    if problems:
        optional = ", ".join((*_OPTIONAL, "allreduce_2_seconds and so on", *_LINK))
        problems.append(f"columns are {', '.join(_REQUIRED)}; optional ones {optional}")
    return problems


def _values(header: Sequence[str], cells: Sequence[str]) -> tuple[list[str], Values]:
    """Read a line: the problems that it has, and the values that can be read."""
    if len(cells) != len(header):
        return [f"{len(cells)} cells, the header has {len(header)}"], {}
    problems: list[str] = []
    values: Values = {}
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


def _block_problems(header: Sequence[str], points: Sequence[Values]) -> list[str]:
    """Values of one block that differ between its lines and should not, and row counts that come twice."""
    problems = []
    for column in (*(c for c in _PER_BLOCK if c in header), *(c for c in header if _ALLREDUCE.fullmatch(c))):
        different = _different(column, points)
        if len(different) > 1:
            shown = " and ".join(map(str, different))
            problems.append(f"{column} is {shown}, expected the same in all its lines")
    counts = Counter(point["rows"] for point in points if "rows" in point)
    return problems + [f"{count} lines for {rows} rows" for rows, count in counts.items() if count > 1]


def _different(column: str, points: Sequence[Values]) -> list[Any]:
    """The values of a column, each once, in the order of the lines."""
    return list({point[column]: None for point in points if column in point})


def _link(header: Sequence[str], points: Sequence[Values], problems: list[str]) -> Values:
    """The link's fields, which all lines repeat."""
    given = [column for column in _LINK if column in header]
    found = {column: _different(column, points) for column in given}
    if given and len(given) < len(_LINK):
        problems.append(f"column '{given[0]}' is there alone; expected both or none of {' and '.join(_LINK)}")
    for column, different in found.items():
        if len(different) > 1:
            problems.append(f"{column} is {' and '.join(map(str, different))}, expected the same in all lines")
    return {} if problems else {_LINK[column]: different[0] for column, different in found.items()}


def _fields(block: int, points: list[Values]) -> Values:
    """The fields of one block from its lines."""
    points = sorted(points, key=lambda point: int(point["rows"]))
    constant = {column: points[0][column] for column in _PER_BLOCK if column in points[0]}
    measured = {name: tuple(point[column] for point in points) for column, name in PER_POINT.items()}
    groups = sorted((_size(column), seconds) for column, seconds in points[0].items() if _ALLREDUCE.fullmatch(column))
    reduced = {"allreduce_ranks": tuple(k for k, _ in groups), "allreduce_seconds": tuple(s for _, s in groups)}
    return {"name": _name(block), **constant, **measured, **reduced}


def _name(block: int) -> str:
    """The name of a block that has no other."""
    return f"block {block}"


def _size(column: str) -> int:
    """The number of ranks of the groups that a column of all-reduces was measured with."""
    found = _ALLREDUCE.fullmatch(column)
    assert found is not None
    return int(found[1])
