"""Orders in which examples are read, and rows that they are packed into; each follows from a seed and the epoch alone."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

from pipestill.arguments import raise_problems, whole
from pipestill.data.example import Example
from pipestill.errors import DataError
from pipestill.model.seeding import derive

_GROUP = 50  # batches among which lengths are sorted


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Random numbers that follow from a seed and what they are for."""
    return torch.Generator().manual_seed(derive(seed, "data", *purpose))


class _Seeded(Sampler[int]):
    """An order that follows from a seed and the epoch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        Args:
            epoch: the number of the pass over the data, from 0.
        """
        self.epoch = epoch


class LengthSampler(_Seeded):
    """Every example once an epoch, such that consecutive `batch_size` ones are about as long; for `DataLoader(sampler=...)`.

    A random order is cut into groups of 50 batches; each group is sorted by length, and the batches of all are shuffled. The
    short last batch stays the last.

    Args:
        lengths: the tokens of each example, as `Examples.lengths()` gives them.
        batch_size: that of the loader.
        seed: the order follows from this and from the epoch, which the trainer sets (`set_epoch`).
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        raise_problems((*whole("batch_size", batch_size, 1), *whole("seed", seed)))
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        super().__init__(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = generator(self.seed, "lengths", self.epoch)
        order = torch.randperm(len(self.lengths), generator=random)
        rest = len(order) - len(order) % self.batch_size
        batches = [
            batch
            for group in order[:rest].split(_GROUP * self.batch_size) if len(group)
            for batch in group[self.lengths[group].argsort(descending=True, stable=True)].split(self.batch_size)
        ]  # fmt: skip
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]
        return iter(torch.cat([*shuffled, order[rest:]]).tolist())


class ShuffledSampler(_Seeded):
    """Every item once an epoch, in an order that follows from a seed and the epoch.

    PyTorch's own shuffling follows from the trainer's seed instead; this one is the same in any trainer and in a plain loop.

    Args:
        num_items: how many there are.
        seed: the order follows from this and from the epoch, which the trainer sets (`set_epoch`).
    """

    def __init__(self, num_items: int, seed: int = 0) -> None:
        raise_problems((*whole("num_items", num_items, 1), *whole("seed", seed)))
        self.num_items = num_items
        super().__init__(seed)

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.num_items, generator=generator(self.seed, "order", self.epoch)).tolist())


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Put examples into rows of at most `length` tokens, whole, with little left over.

    The longest comes first, and each goes where the least room is left (best fit decreasing). Rows come in the order of their
    first examples, and so do the examples of a row.

    Args:
        lengths: the tokens of each example.
        length: the tokens of a row.

    Returns:
        for each row, the numbers of its examples.

    Raises:
        DataError: an example is longer than a row.
    """
    raise_problems(whole("length", length, 1))
    if long := [i for i, size in enumerate(lengths) if size > length]:
        raise DataError(
            f"{len(long)} examples are longer than a row of {length} tokens (example {long[0]} has {lengths[long[0]]}); "
            "tokenize with max_length, or pack into longer rows"
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), in order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[i], -1))
        if place == len(room):
            rows.append([i])
            left, row = length - lengths[i], len(rows) - 1
        else:
            left, row = room.pop(place)
            rows[row].append(i)
            left -= lengths[i]
        if left:
            insort(room, (left, row))
    return sorted(sorted(row) for row in rows)


class Packed(Dataset[tuple[Example, ...]]):
    """Rows of several examples each, packed once by `pack`; `ps.data.PackCollator` makes tensors of them.

    Args:
        examples: a data set of examples, such as `Examples`, or one that a teacher cache was attached to.
        length: the tokens of a row.
        lengths: the tokens of each example. Default: those that `examples.lengths()` gives.
    """

    def __init__(self, examples: Dataset[Example], length: int, lengths: Sequence[int] | None = None) -> None:
        self.examples = examples
        self.length = length
        self.rows = pack(examples.lengths() if lengths is None else lengths, length)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Example, ...]:
        return tuple(self.examples[i] for i in self.rows[index])
