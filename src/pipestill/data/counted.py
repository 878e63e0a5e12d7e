"""What each example of a data set counts for: its tokens, those that are predicted, what was cut off, and what was dropped."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import overload


@dataclass(frozen=True, slots=True)
class Count:
    """What one record of the data counts for."""

    place: str
    """Where the record is."""
    tokens: int
    """How many of its tokens are trained on, over all pieces that it was split into; 0 where it was dropped."""
    counted: int
    """How many of these are predicted: labels other than -100."""
    truncated: int = 0
    """How many tokens were cut off."""
    truncated_counted: int = 0
    """How many tokens that were to be predicted are not, because they or the token before them were cut off."""
    dropped: str = ""
    """Why it was dropped; empty where it was kept."""
    pieces: int = 1
    """How many examples it became."""


class CountedMap(Sequence[Count]):
    """What each record of a data set counts for, in the order of the records."""

    def __init__(self, counts: Sequence[Count] = ()) -> None:
        """Make the map of these counts; `add` appends others.

        Args:
            counts: one for each record.
        """
        self._counts = list(counts)

    def add(self, count: Count) -> None:
        """Append what a further record counts for.

        Args:
            count: its count.
        """
        self._counts.append(count)

    @overload
    def __getitem__(self, index: int) -> Count: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Count]: ...
    def __getitem__(self, index: int | slice) -> Count | Sequence[Count]:
        return self._counts[index]

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[Count]:
        return iter(self._counts)

    @property
    def num_tokens(self) -> int:
        """The tokens of all examples."""
        return sum(count.tokens for count in self._counts)

    @property
    def num_counted(self) -> int:
        """The labels of all examples that count."""
        return sum(count.counted for count in self._counts)

    def summary(self) -> str:
        """Describe the data in a few lines: what is trained on, how long it is, what was cut off and dropped."""
        kept = [count for count in self._counts if not count.dropped]
        lengths = sorted(count.tokens for count in kept)
        tokens, counted = self.num_tokens, self.num_counted
        share = f" ({counted / tokens:.1%})" if tokens else ""
        lines = [f"{len(kept):,} of {len(self):,} records kept: {tokens:,} tokens, of which {counted:,} count{share}"]
        pieces = sum(count.pieces for count in kept)
        if pieces != len(kept):
            lines.append(f"they are split into {pieces:,} examples")
        if lengths:
            lines.append(f"tokens of a record: {lengths[0]:,} to {lengths[-1]:,}, median {median(lengths):,.0f}")
        if cut := [count for count in kept if count.truncated]:
            lost, of_them = sum(c.truncated for c in cut), sum(c.truncated_counted for c in cut)
            lines.append(f"{_records(len(cut))} cut: {_tokens(lost)} lost; {of_them:,} that would have counted do not")
        reasons = Counter(count.dropped for count in self._counts if count.dropped)
        lines += [f"{_records(number)} dropped: {reason}" for reason, number in reasons.most_common()]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the map as JSON lines, one record a line.

        Args:
            path: the file to write.
        """
        lines = [json.dumps(asdict(count), ensure_ascii=False) for count in self._counts]
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _records(number: int) -> str:
    return f"{number:,} record" + "s" * (number != 1)


def _tokens(number: int) -> str:
    return f"{number:,} token" + "s" * (number != 1)
