"""Keys of samples: of the inputs alone, whatever holds them, and found again in any batch."""

from __future__ import annotations

import pytest
import torch

from pipestill.cache.keys import columns, complete_samples, content_key, keys_of, place_key
from pipestill.errors import DataError


def test_a_key_is_of_the_content() -> None:
    ids = torch.tensor([3, 1, 2])
    assert content_key(ids) == content_key(ids.int()) == content_key(torch.tensor([[3, 0], [1, 0], [2, 0]])[:, 0])
    others = [ids.flip(0), ids[:2], ids[None], ids.float(), {"x": ids}, (ids,), [ids, ids], ids.bool()]
    assert len({content_key(other) for other in (ids, *others)}) == 1 + len(others)
    assert content_key({"a": ids, "b": 1}) == content_key({"b": 1, "a": ids})
    assert content_key(torch.zeros(0)) != content_key(torch.zeros(0, 2))


def test_keys_do_not_change_with_versions() -> None:
    """A cache is read years later: these numbers may only change together with the format of a cache."""
    assert content_key(torch.tensor([3, 1, 2])) == (163925720144248136, -5483742610517499589)
    assert place_key("train.jsonl:1") == -1361921913415863087


def test_samples_are_found_in_padded_and_packed_rows() -> None:
    a, b = columns((1, 2), 3, 4), columns((-5, 6), 0, 2)
    none = torch.zeros(1, 4, dtype=torch.int64)
    rows = torch.stack([torch.cat([a, b, b, none]), torch.cat([none, none, none, b, a])])
    found = [((1, 2), 3, 0, 4), ((-5, 6), 0, 4, 2), ((-5, 6), 0, 6, 2), ((-5, 6), 0, 12, 2), ((1, 2), 3, 14, 4)]
    assert complete_samples(rows) == found


def test_samples_that_are_cut_are_not_taken() -> None:
    a = columns((1, 2), 3, 4)
    assert complete_samples(a[None, :3]) == []
    assert complete_samples(a[None, 1:]) == []
    assert complete_samples(a.view(2, 2, 4)) == [], "it lies in two rows"
    mixed = torch.cat([a[:2], columns((7, 7), 3, 4)[2:]])
    assert complete_samples(mixed[None]) == []


def test_rows_of_one_token_are_samples_of_images() -> None:
    rows = torch.cat([columns((1, 2), 3, 1), columns((4, 5), 6, 1)])
    assert complete_samples(rows) == [((1, 2), 3, 0, 1), ((4, 5), 6, 1, 1)]


def test_targets_without_keys_say_where_to_get_them() -> None:
    for target in (None, torch.zeros(2), {"labels": torch.zeros(2)}):
        with pytest.raises(DataError, match=r"give the loader ps\.cache\.keyed\(dataset\)"):
            keys_of(target)
