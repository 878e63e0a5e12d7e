"""Batches: labels shifted, padding and joints not counted, and packed rows with the logits of single examples."""

from __future__ import annotations

import pytest
import torch
from support.chats import TEXT, llama, tokenizer
from torch import Tensor

import pipestill as ps

PAD = 0


@pytest.fixture(scope="module")
def examples() -> ps.data.Examples:
    records = [
        *({"text": text[: 12 + 9 * i]} for i, text in enumerate(TEXT)),
        {"prompt": "Of", "completion": " what?"},
        {"text": "x"},
    ]
    return ps.data.tokenize(records, tokenizer())


@pytest.fixture(scope="module")
def alone(examples: ps.data.Examples) -> list[Tensor]:
    """The logits of each example by itself."""
    model = llama()
    with torch.no_grad():
        return [model(input_ids=example.input_ids[None]).logits[0] for example in examples]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_have_the_labels_and_logits_of_single_examples(
    side: str, examples: ps.data.Examples, alone: list[Tensor]
) -> None:
    inputs, targets = ps.data.PadCollator(PAD, side=side, multiple_of=8)(list(examples))  # type: ignore[arg-type]
    assert inputs["input_ids"].shape[1] % 8 == 0
    assert ("position_ids" in inputs) == (side == "left")
    with torch.no_grad():
        logits = llama()(**inputs).logits
    for row, example in enumerate(examples):
        real = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row, real].equal(example.input_ids)
        assert targets["labels"][row, real].equal(example.labels)
        assert (targets["labels"][row, ~real] == -100).all()
        torch.testing.assert_close(logits[row, real], alone[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "kernel"), [("positions", "sdpa"), ("positions", "eager"), ("mask", "sdpa"), ("mask", "eager")]
)
def test_packed_rows_give_the_logits_of_single_examples(
    attention: str, kernel: str, examples: ps.data.Examples, alone: list[Tensor]
) -> None:
    packed = ps.data.Packed(examples, length=48)
    inputs, targets = ps.data.PackCollator(48, PAD, attention=attention)([packed[i] for i in range(len(packed))])  # type: ignore[arg-type]
    assert len(packed) < len(examples)
    with torch.no_grad():
        logits = llama(attention=kernel)(**inputs).logits
    for row, numbers in enumerate(packed.rows):
        start = 0
        for number in numbers:
            place = slice(start, start + len(examples[number]))
            torch.testing.assert_close(logits[row, place], alone[number], rtol=1e-5, atol=1e-6)
            assert targets["labels"][row, place].equal(examples[number].labels)
            assert targets["labels"][row, place.stop - 1] == -100, "an example predicts the next one"
            assert inputs["position_ids"][row, place].equal(torch.arange(len(examples[number])))
            start = place.stop
        assert (targets["labels"][row, start:] == -100).all()


def test_every_label_is_the_next_token(examples: ps.data.Examples) -> None:
    inputs, targets = ps.data.PadCollator(PAD)(list(examples))
    labels, ids = targets["labels"][:, :-1], inputs["input_ids"][:, 1:]
    assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (targets["labels"][:, -1] == -100).all()


def test_extras_travel_with_their_tokens(examples: ps.data.Examples) -> None:
    given = [
        ps.data.Example(e.input_ids, e.counted, e.place, {"twice": torch.stack([e.input_ids, 2 * e.input_ids], -1).float()})
        for e in examples
    ]
    for side in ("right", "left"):
        inputs, targets = ps.data.PadCollator(PAD, side=side)(given)  # type: ignore[arg-type]
        assert targets["twice"].equal(torch.stack([inputs["input_ids"], 2 * inputs["input_ids"]], -1).float())
    inputs, targets = ps.data.PackCollator(200, PAD)([given])
    assert targets["twice"][..., 0].equal(inputs["input_ids"].float())
    with pytest.raises(ps.UserError, match="differ in their extra targets"):
        ps.data.PadCollator(PAD)([given[0], examples[0]])


def test_what_has_no_room_is_refused_by_name(examples: ps.data.Examples) -> None:
    with pytest.raises(ps.UserError, match=r"record\[0\] has \d+ tokens, and a row has 3; tokenize with max_length=3"):
        ps.data.PadCollator(PAD, length=3)(list(examples))
    with pytest.raises(ps.UserError, match="and a row has 10"):
        ps.data.PackCollator(10, PAD)([list(examples)])
    with pytest.raises(ps.UserError, match=r"pack them first: ps\.data\.Packed"):
        ps.data.PackCollator(10, PAD)(list(examples))  # type: ignore[arg-type]
    with pytest.raises(ps.UserError, match=r"expected examples, one a row.*ps\.data\.PackCollator"):
        ps.data.PadCollator(PAD)([ps.data.Packed(examples, 100)[0]])  # type: ignore[list-item]
    with pytest.raises(ps.UserError, match="pad is -1; .*side is 'both'"):
        ps.data.PadCollator(-1, side="both")  # type: ignore[arg-type]
