"""Masks: what is hidden, what it weighs, and what it follows from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.texts import data, tokens

from pipestill import losses
from pipestill.recipes.masking import Masking, fixed
from pipestill.recipes.sequences import ByLengthSampler
from pipestill.train.data import Reader

pytest.importorskip("tokenizers")


def masked(probability: float = 0.15, rows: int = 400) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    few = data(rows, generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs, targets = Masking(tokens(), 32, probability)([few[i] for i in range(rows)])
    return few.lengths(), inputs, targets


def test_masks_are_berts() -> None:
    lengths, inputs, targets = masked()
    ids, shown = targets["labels"], inputs["input_ids"]
    assert ids.shape == (400, 32)
    assert torch.equal(inputs["attention_mask"].sum(1), lengths)
    chosen, real = ids != -100, inputs["attention_mask"].bool()
    assert not bool((chosen & ~real).any())
    assert torch.equal(targets["tokens"], real.float())
    assert not bool((shown[real & ~chosen] == 4).any())
    assert float(chosen.sum() / real.sum()) == pytest.approx(0.15, abs=0.02)
    as_mask, kept = (shown[chosen] == 4).double().mean(), (shown[chosen] == ids[chosen]).double().mean()
    assert float(as_mask) == pytest.approx(0.8, abs=0.05)
    assert float(kept) == pytest.approx(0.1, abs=0.04)
    assert 1.0 - float(as_mask + kept) > 0.0


def test_no_special_token_is_masked() -> None:
    sequence = torch.tensor([2, 7, 8, 9, 3], dtype=torch.int32)
    inputs, targets = Masking(tokens(), 8, 0.999)([sequence])
    assert (targets["labels"][0] != -100).tolist() == [False, True, True, True, False, False, False, False]
    assert inputs["input_ids"][0, [0, 4]].tolist() == [2, 3]


def test_the_loss_is_the_mean_over_the_batchs_masked_tokens_however_it_is_cut() -> None:
    _, _, targets = masked(rows=10)
    labels = targets["labels"]
    logits = torch.randn((*labels.shape, 120), generator=torch.Generator().manual_seed(1))
    chosen, count = labels != -100, losses.cross_entropy.counts(targets)["cross_entropy"]
    expected = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen])
    for cuts in ((10,), (4, 3, 3), (9, 1)):
        parts = zip(logits.split(cuts), labels.split(cuts), strict=True)
        total = sum(losses.cross_entropy.sums({"logits": a}, {"labels": b})["cross_entropy"] for a, b in parts)
        assert float(total) / count == pytest.approx(float(expected), rel=1e-6)


def test_masks_follow_the_run_s_seed_and_epoch() -> None:
    few = data(20, torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(
        few, batch_size=8, sampler=ByLengthSampler(few.lengths(), 8), collate_fn=Masking(tokens(), 32)
    )

    def shown(seed: int) -> list[torch.Tensor]:
        reader = Reader(loader, epochs=2, steps=None, seed=seed, length_axis=1)
        try:
            return [batch.inputs["input_ids"] for batch in reader]
        finally:
            reader.close()

    one, same, other = shown(0), shown(0), shown(1)
    assert len(one) == 6
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one[:3], one[3:], strict=True))
    assert len({batch.shape[1] for batch in one}) > 1


def test_tests_see_the_same_masks() -> None:
    few = data(20, torch.Generator().manual_seed(0))
    one, same, other = (fixed(few, Masking(tokens(), 32), 8, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[0]["input_ids"], b[0]["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0][0]["input_ids"], other[0][0]["input_ids"])
    assert [batch[0]["input_ids"].shape[0] for batch in one] == [8, 8, 4]
