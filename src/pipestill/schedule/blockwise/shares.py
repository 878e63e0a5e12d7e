"""Shares: which rank takes which rows of which batch through a block.

0@1            all rows of batch 0 are rank 1's, as written in a schedule's text
0@1:1/3-1      its rows after the first third are
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipestill.schedule.text import Fields

Part = tuple[Fraction, Fraction]
"""First and last (exclusive) row of a part of a batch, as fractions of its rows."""

WHOLE: Part = (Fraction(0), Fraction(1))

_NUMBER = "(?:0|[1-9][0-9]{0,8})"
_FRACTION = f"{_NUMBER}(?:/[1-9][0-9]{{0,8}})?"
_SHARE = re.compile(f"(?P<batch>{_NUMBER})@(?P<rank>{_NUMBER})(?::(?P<first>{_FRACTION})-(?P<end>{_FRACTION}))?", re.ASCII)
_BLOCK = re.compile(f"(?:teacher|student) ({_NUMBER})")


def rows_of_part(part: Part, rows: int) -> slice:
    """The rows of a part of a batch: parts that touch leave no row out and take none twice, whatever the batch's size."""
    first, end = part
    return slice(first.numerator * rows // first.denominator, end.numerator * rows // end.denominator)


def common(a: Part, b: Part) -> Part:
    """The rows that are in both parts; when there are none, its end is not after its start."""
    return max(a[0], b[0]), min(a[1], b[1])


def overlap(a: Part, b: Part) -> bool:
    """Whether two parts have rows in common."""
    first, end = common(a, b)
    return first < end


def tiles(parts: Iterable[Part], whole: Part) -> bool:
    """Whether the parts are all rows of the whole, each once."""
    edges = [whole[0], *(edge for part in sorted(parts) for edge in part), whole[1]]
    return edges[::2] == edges[1::2]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one batch's rows that one rank takes through a block; `batch` counts from 0 in a step."""

    batch: int
    rank: int
    part: Part = WHOLE

    def __post_init__(self) -> None:
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"a share of rows {self.part[0]} to {self.part[1]}; expected more than none, from 0 to 1")

    def __str__(self) -> str:
        rows = "" if self.part == WHOLE else f":{self.part[0]}-{self.part[1]}"
        return f"{self.batch}@{self.rank}{rows}"


def equal_shares(ranks: Sequence[int], batch: int = 0) -> tuple[Share, ...]:
    """A batch in equal parts, one for each rank in order (Pipe-BD, Jang et al., DATE 2023: automatic hybrid distribution)."""
    count = len(ranks)
    return tuple(Share(batch, rank, (Fraction(j, count), Fraction(j + 1, count))) for j, rank in enumerate(ranks))


def share_lines(name: str, blocks: Sequence[Sequence[Share]]) -> list[str]:
    """One line for each block of a model, such as `teacher 0: 0@1`."""
    return [f"{name} {block}: {' '.join(map(str, shares)) or 'none'}" for block, shares in enumerate(blocks)]


def blocks_in(fields: Fields) -> range:
    """The numbers of the blocks that lines speak about, up to the highest."""
    named = map(_BLOCK.fullmatch, fields)
    return range(1 + max((int(match[1]) for match in named if match), default=0))


def parse_shares(key: str, fields: Fields) -> tuple[Share, ...]:
    """Take out the line of one block and read its shares."""
    text = fields.pop(key)
    return () if text == "none" else tuple(_parse_share(key, word) for word in text.split() or [""])


def _parse_share(key: str, word: str) -> Share:
    """Read one share of a block's line, which `key` names in errors."""
    match = _SHARE.fullmatch(word)
    if match is None:
        raise ValueError(
            f"'{key}: ... {word}' in a schedule: expected shares like 0@1 (batch 0 on rank 1) or 0@1:1/3-1 (its rows "
            "after the first third), or 'none'"
        )
    part = WHOLE if match["first"] is None else (Fraction(match["first"]), Fraction(match["end"]))
    try:
        return Share(int(match["batch"]), int(match["rank"]), part)
    except ValueError as error:
        raise ValueError(f"'{key}: ... {word}' in a schedule: {error}") from None
