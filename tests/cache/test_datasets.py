"""Items of data sets get further targets, whatever kind of data set it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.caches import examples, loader
from support.chats import backend
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pipestill as ps
from pipestill.cache.keys import complete_samples, key_of, place_key


def test_examples_get_their_keys_in_every_layout() -> None:
    keyed = ps.cache.keyed(examples())
    expected = sorted((key_of(example), place_key(example.place), len(example)) for example in examples())

    def found(targets: Any) -> list[Any]:
        return [(key, place, length) for key, place, _, length in complete_samples(targets["sample"])]

    right = [sample for _, targets in loader(keyed) for sample in found(targets)]
    left_collate = ps.data.PadCollator(0, side="left")
    left = [sample for _, targets in DataLoader(keyed, batch_size=3, collate_fn=left_collate) for sample in found(targets)]
    packed = ps.data.Packed(keyed, 40)
    rows = DataLoader(packed, batch_size=2, collate_fn=ps.data.PackCollator(40, 0))
    joined = [sample for _, targets in rows for sample in found(targets)]
    assert sorted(right) == sorted(left) == sorted(joined) == expected


def test_places_of_streams_are_not_kept() -> None:
    """In the next pass another sample may be the first: that is no augmentation."""
    stream = ps.data.Stream([{"text": "one"}, {"text": "two"}], ps.data.Tokenization(backend()), shuffle_buffer=2)
    keyed = ps.cache.keyed(stream)
    keyed.set_epoch(3)
    assert int(stream._epoch) == 3
    assert all((example.extras["sample"][:, 2] == 0).all() for example in keyed)


def test_pairs_become_pairs_with_named_targets() -> None:
    keyed = ps.cache.keyed(TensorDataset(torch.eye(3), torch.tensor([4, 5, 6])))
    inputs, targets = next(iter(DataLoader(keyed, batch_size=3)))
    assert inputs.equal(torch.eye(3))
    assert targets["labels"].tolist() == [4, 5, 6]
    assert targets["sample"].shape == (3, 4)
    assert len(complete_samples(targets["sample"])) == 3


def test_other_items_are_refused() -> None:
    class Triples(Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return 1, 2, 3

    with pytest.raises(ps.UserError, match=r"an item of the data set is \(1, 2, 3\); expected a ps\.data\.Example"):
        ps.cache.keyed(Triples())[0]
