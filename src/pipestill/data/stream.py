"""Examples of data that is read as it comes: too large for memory, or without an end."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipestill.arguments import hinted, one_of, raise_problems, whole
from pipestill.data.counted import CountedMap
from pipestill.data.example import Example
from pipestill.data.orders import generator, pack
from pipestill.data.records import Record, Records, records_of
from pipestill.data.tokenize import Tokenization
from pipestill.errors import ConfigError

_CHUNK = 512  # examples that are packed together

T = TypeVar("T")


@hinted
class Stream(IterableDataset[Example | tuple[Example, ...]]):
    """Examples of records that are read, tokenized, shuffled and packed as they come; for `DataLoader(stream, ...)`.

    The order follows from the seed, the epoch and the number of the loader's workers. Each worker of a `DataLoader` takes its
    share of the records. The first wrong record ends the run with its place.

    Args:
        records: as for `tokenize`; an iterable that starts anew with each epoch.
        tokenization: how records become examples, a `Tokenization`.
        shuffle_buffer: how many examples are held, of which each next one is drawn at random; 0 keeps their order.
        pack_length: put examples into rows of so many tokens, for `PackCollator`: the stream then gives tuples of examples.
            Default: single examples, for `PadCollator`.
        seed: the order follows from this and from the epoch, which the trainer sets (`set_epoch`).

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        records: Records,
        tokenization: Tokenization,
        *,
        shuffle_buffer: int = 0,
        pack_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        problems = [*whole("shuffle_buffer", shuffle_buffer, 0), *whole("seed", seed)]
        problems += one_of("tokenization", tokenization, Tokenization, "a ps.data.Tokenization(tokenizer, max_length=...)")
        problems += [] if pack_length is None else whole("pack_length", pack_length, 1)
        raise_problems(problems, ConfigError)
        if isinstance(records, Iterator):
            raise ConfigError(
                "records can be read once only; give an object whose __iter__ starts anew, such as ps.data.JsonLines"
            )
        self.records = records
        self.tokenization = tokenization
        self.shuffle_buffer = shuffle_buffer
        self.pack_length = pack_length
        self.seed = seed
        self.counts = CountedMap()
        """What each record of the last epoch counts for, as far as this process has read it: not what workers read."""
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that workers that persist see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        Args:
            epoch: the number of the pass over the data, from 0.
        """
        self._epoch.fill_(epoch)
        if hasattr(self.records, "set_epoch"):
            self.records.set_epoch(epoch)

    def __iter__(self) -> Iterator[Example | tuple[Example, ...]]:
        self.counts = CountedMap()
        worker = get_worker_info()
        random = generator(self.seed, "stream", int(self._epoch), worker.id if worker else 0)
        examples = shuffled(self._examples(), self.shuffle_buffer, random)
        return examples if self.pack_length is None else packed(examples, self.pack_length)

    def _examples(self) -> Iterator[Example]:
        for record in self._share():
            examples, count = self.tokenization(record)
            self.counts.add(count)
            yield from examples

    def _share(self) -> Iterator[Record]:
        """This worker's share of the records; data sets that are streams of their own share among workers themselves."""
        records, worker = records_of(self.records), get_worker_info()
        if worker is None or isinstance(getattr(self.records, "dataset", self.records), IterableDataset):
            return records
        return islice(records, worker.id, None, worker.num_workers)


def shuffled(items: Iterable[T], size: int, random: torch.Generator) -> Iterator[T]:
    """Yield items in a random order, each drawn from the `size` that were read and not given yet."""
    held: list[T] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        if size:
            place = int(torch.randint(size, (), generator=random))
            held[place], item = item, held[place]
        yield item
    for place in torch.randperm(len(held), generator=random).tolist():
        yield held[place]


def packed(examples: Iterator[Example], length: int) -> Iterator[tuple[Example, ...]]:
    """Yield rows of examples, packed by some hundred at a time."""
    while chunk := list(islice(examples, _CHUNK)):
        for row in pack([len(example) for example in chunk], length):
            yield tuple(chunk[i] for i in row)
