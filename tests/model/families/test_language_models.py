"""Hugging Face's language models as blocks: what they give is what the model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipestill import BlockModel
from pipestill.errors import ModelError
from pipestill.model.blocks import ranges
from pipestill.model.families.language_models import language_model_blocks
from pipestill.model.families.replay import cut_by_replay

transformers = pytest.importorskip("transformers")

SIZES: dict[str, dict[str, Any]] = {
    "Bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
}
SIZES["Roberta"] = SIZES["Bert"]
HEADS = {
    "Bert": ("Model", "ForMaskedLM", "ForSequenceClassification"),
    "Roberta": ("Model", "ForMaskedLM", "ForSequenceClassification"),
    "DistilBert": ("Model", "ForMaskedLM", "ForSequenceClassification"),
}
CLASSES = [(family, head) for family, heads in HEADS.items() for head in heads]


def made(family: str, head: str, **options: Any) -> Any:
    sizes = {"vocab_size": 40, "max_position_embeddings": 12, **SIZES[family], **options}
    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}{head}")(config)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(5, 40, (3, 8), generator=generator), torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("family", "head"), CLASSES)
def test_blocks_give_what_the_model_gives(family: str, head: str, train: bool) -> None:
    """With dropout, drawn alike; with a mask, without one, and from ids alone."""
    model = made(family, head).train(train)
    blocks = BlockModel(model)
    assert len(blocks) == 6
    inputs = batch()
    given = [(inputs, inputs), (ids := {"input_ids": inputs["input_ids"]}, ids), (inputs["input_ids"], ids)]
    if family == "Bert":
        types = {**inputs, "token_type_ids": (inputs["input_ids"] > 20).long()}
        given.append((types, types))
    with torch.random.fork_rng(), torch.no_grad():
        for value, arguments in given:
            torch.manual_seed(2)
            whole = model(**arguments)
            torch.manual_seed(2)
            got = blocks(value)
            assert got.keys() & whole.keys() == set(got) - ({"last_hidden_state"} if head != "Model" else set())
            for name in got.keys() & whole.keys():
                assert torch.equal(got[name], whole[name]), name
    assert got["last_hidden_state"].shape == (3, 8, 16)


@pytest.mark.parametrize(("family", "head"), CLASSES)
def test_gradients_are_the_models(family: str, head: str) -> None:
    model = made(family, head).eval()
    name = "last_hidden_state" if head == "Model" else "logits"
    gradients = []
    for output in (model(**batch())[name], BlockModel(model)(batch())[name]):
        model.zero_grad()
        output.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_layer_whose_call_does_more_than_its_halves_stays_whole(family: str) -> None:
    hooked, again = (made(family, "ForMaskedLM").train() for _ in range(2))
    layer = next(m for n, m in hooked.named_modules() if n.endswith("layer.1"))
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    assert len(BlockModel(hooked)) == 5
    assert torch.equal(BlockModel(hooked.eval())(batch())["logits"], hooked(**batch()).logits)
    for module in again.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert [block.name.rpartition(".")[2] for block in BlockModel(again).blocks] == ["embeddings", "0", "1", "head"]


def test_the_mask_travels_small() -> None:
    """(rows, length) truth values, not the (rows, 1, length, length) that layers make of it."""
    blocks = BlockModel(made("Bert", "ForMaskedLM")).blocks
    value = blocks[1].call(blocks[0].call(batch()))
    assert {name: (tuple(t.shape), t.dtype) for name, t in value.items()} == {
        "hidden": ((3, 8, 16), torch.float32), "mask": ((3, 8), torch.bool),
    }  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_the_config_names(attention: str) -> None:
    model = made("DistilBert", "ForMaskedLM", attn_implementation=attention).eval()
    assert model.config._attn_implementation == attention
    assert torch.equal(BlockModel(model)(batch())["logits"], model(**batch()).logits)


def test_padding_does_not_matter() -> None:
    model = BlockModel(made("Bert", "ForMaskedLM").eval())
    inputs = batch()
    other = {**inputs, "input_ids": inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)}
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    real = inputs["attention_mask"].bool()
    assert torch.equal(model(inputs)["logits"][real], model(other)["logits"][real])


def test_tied_embeddings_of_a_student_are_refused_over_stages_with_the_remedy() -> None:
    tied, apart = (BlockModel(made("DistilBert", "ForMaskedLM", tie_word_embeddings=tie)) for tie in (True, False))
    tied.check_ties(ranges((6,)))
    apart.check_ties(ranges((3, 3)))
    with pytest.raises(ModelError, match=r"config\.tie_word_embeddings=False"):
        tied.check_ties(ranges((3, 3)))


def test_a_subclass_with_its_own_forward_is_cut_by_replay() -> None:
    class Renamed(transformers.BertForMaskedLM):  # type: ignore[misc, name-defined]
        pass

    class Doubled(transformers.BertForMaskedLM):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Tensor) -> Any:
            return super().forward(input_ids).logits * 2

    config = made("Bert", "Model").config
    assert language_model_blocks(Renamed(config)) is not None
    doubled = Doubled(config).eval()
    assert language_model_blocks(doubled) is None
    blocks = BlockModel(doubled, cut_by_replay(doubled, {"input_ids": batch()["input_ids"]}))
    assert len(blocks) == 4
    assert torch.equal(blocks({"input_ids": batch()["input_ids"]}), doubled(batch()["input_ids"]))
    assert language_model_blocks(nn.Linear(2, 2)) is None


def test_what_half_layers_would_leave_out_is_replayed() -> None:
    """A decoder made of a BERT, and hooks on modules that only hold others."""
    model = made("Bert", "ForMaskedLM", is_decoder=True).eval()
    model.bert.encoder.register_forward_hook(lambda module, inputs, output: setattr(output, "last_hidden_state", output[0] * 2))
    assert len(BlockModel(model)) == 4
    assert torch.equal(BlockModel(model)(batch())["logits"], model(**batch()).logits)


def test_unknown_inputs_are_named() -> None:
    with pytest.raises(ModelError, match="hold labels; this model's blocks read input_ids, attention_mask"):
        BlockModel(made("Bert", "ForMaskedLM"))({**batch(), "labels": batch()["input_ids"]})
