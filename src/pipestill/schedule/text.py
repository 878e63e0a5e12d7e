"""Lines of a schedule's text: numbers, yes and no, and which rank takes which rows through the blocks.

teacher 0: 0@0 1@0                    batches 0 and 1 of a window are rank 0's
student 0: 0@0:0-1/3 0@1:1/3-1 1@1    ranks 0 and 1 share batch 0 after a third of its rows; batch 1 is rank 1's
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from pipestill.schedule.blockwise.structure import WHOLE, BlockwiseStructure, Share

Fields = dict[str, str]
"""The lines by what stands before their colon; what is read is taken out."""

_OF_BLOCKS = ("ranks", "window", "ahead", "barrier")
_NUMBER = "(?:0|[1-9][0-9]{0,8})"
_FRACTION = f"{_NUMBER}(?:/[1-9][0-9]{{0,8}})?"
_SHARE = re.compile(
    f"(?P<batch>{_NUMBER})@(?P<rank>{_NUMBER})(?::(?P<first>{_FRACTION})-(?P<end>{_FRACTION}))?", re.ASCII
)


def block_lines(structure: BlockwiseStructure) -> list[str]:
    """The structure, as `parse_blocks` reads it."""
    roles = (("teacher", structure.teacher), ("student", structure.student))
    return [
        f"ranks: {structure.num_ranks}",
        f"window: {structure.window}",
        f"barrier: {yes_or_no(structure.barrier)}",
        f"ahead: {structure.ahead}",
        *(
            f"{role} {block}: {' '.join(map(_written, shares)) or 'none'}"
            for role, blocks in roles
            for block, shares in enumerate(blocks)
        ),
    ]


def of_blocks(fields: Fields) -> bool:
    """Whether these are the lines of blocks that train alone; a line may be missing."""
    return "student ranks" not in fields and "teacher ranks" not in fields and any(key in fields for key in _OF_BLOCKS)


def parse_blocks(fields: Fields) -> BlockwiseStructure:
    """Read back `block_lines`. `KeyError` is a line that is missing, `ValueError` says what is wrong."""
    named = [re.fullmatch(f"(?:teacher|student) ({_NUMBER})", key) for key in fields]
    blocks = range(1 + max((int(match[1]) for match in named if match), default=0))  # in which the first gap raises
    return BlockwiseStructure(
        num_ranks=parse_number("ranks", fields),
        window=parse_number("window", fields),
        teacher=tuple(_shares(f"teacher {i}", fields) for i in blocks),
        student=tuple(_shares(f"student {i}", fields) for i in blocks),
        barrier=parse_truth("barrier", fields),
        ahead=parse_number("ahead", fields),
    )


def _written(share: Share) -> str:
    rows = "" if share.part == WHOLE else f":{share.part[0]}-{share.part[1]}"
    return f"{share.batch}@{share.rank}{rows}"


def _shares(key: str, fields: Fields) -> tuple[Share, ...]:
    text = fields.pop(key)
    return () if text == "none" else tuple(_share(key, word) for word in text.split() or [""])


def _share(key: str, word: str) -> Share:
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


def numbers(values: Iterable[int]) -> str:
    """Numbers as `parse_numbers` reads them."""
    return " ".join(map(str, values)) or "none"


def parse_numbers(key: str, fields: Fields) -> tuple[int, ...]:
    """The numbers of a line."""
    text = fields.pop(key)
    if text == "none":
        return ()
    if re.fullmatch(r"[0-9]{1,9}( +[0-9]{1,9})*", text) is None:
        raise ValueError(f"'{key}: {text}' in a schedule: expected whole numbers with spaces between, or 'none'")
    return tuple(map(int, text.split()))


def parse_number(key: str, fields: Fields) -> int:
    """The one number of a line."""
    text = fields.pop(key)
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise ValueError(f"'{key}: {text}' in a schedule: expected a whole number")
    return int(text)


def yes_or_no(truth: bool) -> str:
    """A truth as `parse_truth` reads it."""
    return "yes" if truth else "no"


def parse_truth(key: str, fields: Fields) -> bool:
    """Whether a line says yes."""
    text = fields.pop(key)
    if text not in ("yes", "no"):
        raise ValueError(f"'{key}: {text}' in a schedule: expected yes or no")
    return text == "yes"
