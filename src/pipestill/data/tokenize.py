"""From records to examples: tokens, what of them counts, and what is done with those that are too long."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipestill.arguments import hinted, raise_problems, shown, whole
from pipestill.data.counted import Count, CountedMap
from pipestill.data.encode import Encoder, Encoding
from pipestill.data.example import Example
from pipestill.data.records import Record, Records, records_of, refuse_bad
from pipestill.errors import ConfigError, DataError

Truncation = Literal["refuse", "end", "start", "split", "drop"]
"""What is done with more tokens than `max_length`: "refuse" them, cut off the "end" or the "start", "split" them into several
examples, or "drop" the whole record."""


@hinted
@dataclass(frozen=True)
class Tokenization:
    """Makes examples of records, and counts what becomes of each.

    Args:
        tokenizer: a tokenizer of `transformers`, or of `tokenizers` where no record is a chat.
        max_length: most tokens of an example. Default: no limit.
        truncate: what is done with longer ones: "refuse" raises, "end" and "start" cut these off, "split" makes several examples
            of one, and "drop" leaves the record out.
        end: append the tokenizer's end-of-sequence token to texts and completions that have none.
        answers: of chats, "all" answers count, or the "last" one only.

    Raises:
        ConfigError: an argument is wrong.
    """

    tokenizer: Any
    _: KW_ONLY
    max_length: int | None = None
    truncate: Truncation = "refuse"
    end: bool = True
    answers: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        problems = [] if self.max_length is None else list(whole("max_length", self.max_length, 2))
        if self.truncate not in get_args(Truncation):
            problems.append(f"truncate is {shown(self.truncate)}; expected one of {', '.join(get_args(Truncation))}")
        raise_problems(problems, ConfigError)
        object.__setattr__(self, "_encoder", Encoder(self.tokenizer, self.end, self.answers))

    def __call__(self, record: Record) -> tuple[list[Example], Count]:
        """Make the examples of one record: one, several where it is split, none where it is dropped.

        Args:
            record: the record.

        Raises:
            DataError: it cannot be read, or is too long and `truncate` refuses that; begins with its place.
        """
        encoder: Encoder = self._encoder  # type: ignore[attr-defined]
        try:
            encoding = encoder(record)
            pieces = self._pieces(encoding)
        except DataError as error:
            raise DataError(f"{record.place} {error}") from None
        before = sum(encoding.counted[1:])
        kept = [piece for piece in pieces if any(piece.counted[1:])]
        if not kept:
            return [], Count(record.place, 0, 0, dropped=self._why_dropped(encoding, pieces), pieces=0)
        tokens = sum(len(piece.ids) for piece in kept)
        counted = sum(sum(piece.counted[1:]) for piece in kept)
        count = Count(record.place, tokens, counted, len(encoding.ids) - tokens, before - counted, pieces=len(kept))
        names = [record.place] if len(kept) == 1 else [f"{record.place} piece {i}" for i in range(len(kept))]
        return [
            Example(torch.tensor(piece.ids), torch.tensor(piece.counted), name) for piece, name in zip(kept, names, strict=True)
        ], count

    def _pieces(self, encoding: Encoding) -> list[Encoding]:
        """What is left of an encoding, cut to `max_length`."""
        length, limit = len(encoding.ids), self.max_length
        if limit is None or length <= limit:
            return [encoding]
        if self.truncate == "refuse":
            raise DataError(
                f"has {length} tokens, more than max_length {limit}; choose what is cut: truncate='end', 'start', 'split', 'drop'"
            )
        starts = {"end": [0], "start": [length - limit], "drop": [], "split": list(range(0, length, limit))}[self.truncate]
        return [Encoding(encoding.ids[start : start + limit], encoding.counted[start : start + limit]) for start in starts]

    def _why_dropped(self, encoding: Encoding, pieces: list[Encoding]) -> str:
        if not any(encoding.counted[1:]):
            return "no token of it counts"
        return f"{'nothing that counts is within' if pieces else 'longer than'} max_length {self.max_length}"


class Examples(Dataset[Example]):
    """Examples of a data set in memory, 5 bytes a token, with the map of what each record counts for.

    `ps.data.tokenize` makes them.
    """

    def __init__(self, ids: Tensor, counted: Tensor, starts: Tensor, places: list[str], counts: CountedMap) -> None:
        """Hold examples one after the other.

        Args:
            ids: the tokens of all, (tokens,), int32.
            counted: which of these are to be predicted, (tokens,), bool.
            starts: where each example begins, and the end of the last, (examples + 1,).
            places: where each example is from.
            counts: what each record counts for.
        """
        self.ids = ids
        self.counted = counted
        self.starts = starts
        self.places = places
        self.counts = counts

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # negative ones from the end; IndexError beyond
        place = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return Example(self.ids[place].long(), self.counted[place], self.places[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> list[int]:
        """Count the tokens of each example."""
        lengths: list[int] = self.starts.diff().tolist()
        return lengths


def tokenize(records: Records, tokenizer: Any, **options: Any) -> Examples:
    """Read all records and turn them into examples.

    Args:
        records: a reader (`ps.data.JsonLines`, `ps.data.TextFiles`, `ps.data.HuggingFace`), or any iterable of dicts. Each has
            `text`, or `prompt` and `completion`, or `messages`.
        tokenizer: a tokenizer of `transformers`, or of `tokenizers` where no record is a chat; or a `Tokenization`, without
            further options.
        **options: those of `ps.data.Tokenization`: `max_length`, `truncate`, `end` and `answers`.

    Returns:
        the examples; `.counts` tells what each record counts for, `.counts.summary()` in a few lines.

    Raises:
        DataError: records are wrong; lists the first few, each with its place, or nothing that counts is left.
    """
    make = tokenizer if isinstance(tokenizer, Tokenization) else Tokenization(tokenizer, **options)
    found: list[Example] = []
    counts, problems = CountedMap(), list[str]()
    for record in records_of(records):
        try:
            examples, count = make(record)
        except DataError as error:
            problems.append(str(error))
            continue
        found += examples
        counts.add(count)
    refuse_bad(problems)
    if not found:
        why = counts.summary().replace("\n", "; ") if len(counts) else "there was no record"
        raise DataError(f"no example is left to train on: {why}")
    return Examples(
        torch.cat([example.input_ids for example in found]).int(), torch.cat([example.counted for example in found]),
        torch.tensor([0, *(len(example) for example in found)]).cumsum(0), [example.place for example in found], counts,
    )  # fmt: skip
