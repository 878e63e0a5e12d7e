"""Data sets whose items get something more: keys of samples while a cache is written, what the teacher said when it is read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pipestill.arguments import shown
from pipestill.cache.keys import SAMPLE, Key, columns, content_key, key_of, place_key
from pipestill.data import Example
from pipestill.errors import DataError

Extra = Callable[[Key, int, int, str], Mapping[str, Tensor]]
"""From a sample's key, its place as a hash, its tokens and its place in words to further targets, the first axis of which counts
tokens."""


class _Given:
    """What wrappers of a data set pass on."""

    def __init__(self, dataset: Any, extra: Extra) -> None:
        self.dataset = dataset
        self.extra = extra

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set the epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def lengths(self) -> Any:
        """The tokens of each example, where the data set tells them."""
        return self.dataset.lengths()


class _Mapped(_Given, Dataset[Any]):
    """A data set with an order of its own."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return with_extra(self.dataset[index], self.extra, f"sample {index}", named=True)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class _Streamed(_Given, IterableDataset[Any]):
    """A data set that is read as it comes. A place of it may be of another sample in the next pass, so places are not kept."""

    def __iter__(self) -> Iterator[Any]:
        return (with_extra(item, self.extra, "a sample", named=False) for item in self.dataset)


def extended(dataset: Any, extra: Extra) -> Any:
    """Make a data set whose items have further targets."""
    return (_Streamed if isinstance(dataset, IterableDataset) else _Mapped)(dataset, extra)


def with_extra(item: Any, extra: Extra, place: str, *, named: bool) -> Any:
    """Add targets to an example, to each example of a packed row, or to a pair of inputs and target.

    `named`: a place is of the same sample each time.
    """
    if isinstance(item, Example):
        found = extra(key_of(item), place_key(item.place) if named else 0, len(item), item.place)
        return replace(item, extras={**item.extras, **found})
    if isinstance(item, tuple) and item and all(isinstance(one, Example) for one in item):
        return tuple(with_extra(one, extra, place, named=named) for one in item)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, target = item
        targets = dict(target) if isinstance(target, Mapping) else {"labels": torch.as_tensor(target)}
        found = extra(content_key(inputs), place_key(place) if named else 0, 1, place)
        return inputs, {**targets, **{name: tensor[0] for name, tensor in found.items()}}
    raise DataError(
        f"an item of the data set is {shown(item)}; expected a ps.data.Example, a packed row of these, or a pair (inputs, target)"
    )


def keyed(dataset: Any) -> Any:
    """Add the keys of samples to the targets of a data set, as `sample`, for a cache that is written while training.

    Args:
        dataset: gives `ps.data.Example`s (`Examples`, `Packed`, `Stream`), or pairs (inputs, target) of one sample each, whose
            targets become dicts with `labels`.
    """
    return extended(dataset, lambda key, place, length, _: {SAMPLE: columns(key, place, length)})
