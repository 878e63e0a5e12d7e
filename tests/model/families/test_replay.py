"""Models of transformers that are cut by replaying their forward: blocks give what it gives, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.pairwise import every_other
from support.tiny_models import inputs_for, texts, tiny
from torch import Tensor

import pipestill as ps
from pipestill.errors import ModelError, UserError
from pipestill.model.estimate import Machine, estimate, task_without_memory

transformers = pytest.importorskip("transformers")

LLAMA = ("llama", "LlamaForCausalLM")
T5 = ("t5", "T5ForConditionalGeneration")
KINDS = {
    "llama": LLAMA, "gpt2": ("gpt2", "GPT2LMHeadModel"), "gemma2": ("gemma2", "Gemma2ForCausalLM"), "t5": T5,
    "whisper": ("whisper", "WhisperForConditionalGeneration"), "vit": ("vit", "ViTForImageClassification"),
    "swin": ("swin", "SwinForImageClassification"), "wav2vec2": ("wav2vec2", "Wav2Vec2ForCTC"),
}  # fmt: skip


def outputs(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model(
        **inputs, **({"use_cache": False} if model.main_input_name != "pixel_values" and hasattr(model, "generate") else {})
    )


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_what_the_forward_gives(kind: str) -> None:
    """To the bit; in train mode too, with the same random numbers, where one replay runs all blocks."""
    model = tiny(*KINDS[kind]).eval()
    blocks, inputs = ps.BlockModel(model), inputs_for(model)
    assert len(blocks) >= 5
    with torch.no_grad():
        expected = outputs(model, inputs)
        value: Any = inputs
        for block in blocks.blocks:
            value = block.call(value)
        assert value.keys() >= {"logits"}
        for name in value:
            assert torch.equal(value[name], expected[name]), name
            assert torch.equal(blocks(inputs)[name], expected[name]), name
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            expected = outputs(model, inputs).logits
            torch.manual_seed(1)
            assert torch.equal(blocks(inputs)["logits"], expected)


def test_hidden_states_travel_and_what_depends_on_weights() -> None:
    """Not the masks and rotary embeddings, which every stage makes anew, nor an image that only the first block reads."""
    blocks = ps.BlockModel(tiny(*LLAMA)).blocks
    value = blocks[1].call(blocks[0].call(texts()))
    assert value["hidden"].shape == (4, 10, 32)
    assert value["more"] == ()
    assert list(value["inputs"]) == ["input_ids", "attention_mask"]
    blocks = ps.BlockModel(tiny(*T5)).blocks
    value = inputs_for(tiny(*T5))
    for block in blocks[:6]:
        value = block.call(value)
    assert blocks[5].name == "decoder.block.0"
    assert [tuple(t.shape) for t in value["more"]] == [(1, 4, 10, 10), (4, 10, 32), (1, 4, 10, 10)]
    vit = tiny(*KINDS["vit"])
    assert ps.BlockModel(vit).blocks[0].call(inputs_for(vit))["inputs"] == {"pixel_values": (4, 3, 32, 32)}


def test_every_tensor_belongs_to_a_block_and_buffers_to_all() -> None:
    blocks = ps.BlockModel(tiny(*LLAMA))
    assert [block.name for block in blocks.blocks] == ["embeddings", *(f"model.layers.{i}" for i in range(3)), "head"]
    assert list(blocks.parameters_of(range(1))) == ["model.embed_tokens.weight"]
    assert list(blocks.parameters_of(range(4, 5))) == ["model.norm.weight", "lm_head.weight"]
    assert all("model.rotary_emb.inv_freq" in blocks.tensors_of(range(i, i + 1)) for i in range(5))


def test_a_block_reads_no_weights_of_others() -> None:
    """With NaN in all others nothing changes."""
    model = tiny(*T5).eval()
    blocks, inputs = ps.BlockModel(model), inputs_for(model)
    values: list[Any] = [inputs]
    with torch.no_grad():
        for block in blocks.blocks:
            values.append(block.call(values[-1]))
        for i in range(len(blocks)):
            own = blocks.parameters_of(range(i, i + 1))
            kept = {name: p.clone() for name, p in model.named_parameters()}
            for name, parameter in model.named_parameters():
                if name not in own:
                    parameter.fill_(float("nan"))
            got = blocks.blocks[i].call(values[i])
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
            key = "hidden" if "hidden" in got else "logits"
            assert torch.equal(got[key], values[i + 1][key])


def test_packed_sequences_do_not_see_each_other() -> None:
    """By positions that start again, and by a mask of blocks on the diagonal, both as the model itself takes them."""
    model = tiny(*LLAMA).eval()
    blocks = ps.BlockModel(model)
    ids = texts()["input_ids"]
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]).expand(4, -1)
    part = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    diagonal = ((part[:, None] == part) & torch.ones(10, 10).tril().bool()).expand(4, 1, -1, -1)
    with torch.no_grad():
        for inputs in ({"input_ids": ids, "position_ids": positions},
                       {"input_ids": ids, "position_ids": positions, "attention_mask": diagonal}):  # fmt: skip
            got = blocks(inputs)["logits"]
            assert torch.equal(got, model(**inputs, use_cache=False).logits)
            apart = model(input_ids=ids[:, 4:], use_cache=False).logits
            torch.testing.assert_close(got[:, 4:], apart)


def test_gradients_cross_boundaries_and_reach_embeddings_that_are_given() -> None:
    model = tiny(*LLAMA).eval()
    blocks = ps.BlockModel(model)
    embedded = model.model.embed_tokens(texts()["input_ids"]).detach()
    found = []
    for call in (lambda x: model(inputs_embeds=x, use_cache=False).logits, lambda x: blocks({"inputs_embeds": x})["logits"]):
        model.zero_grad()
        leaf = embedded.clone().requires_grad_()
        call(leaf).square().mean().backward()
        found.append([leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + sum(1 for _ in model.parameters()) - 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # the oldest has no other
def test_checkpointing_and_hooks_of_layers_go_on_working() -> None:
    model = tiny(*LLAMA).train()
    expected = ps.BlockModel(model)(texts())["logits"]
    model.gradient_checkpointing_enable()
    seen: list[str] = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append("layer"))
    model.model.register_forward_hook(lambda module, args, output: seen.append("model"))
    blocks = ps.BlockModel(model)
    seen.clear()
    assert torch.equal(blocks(texts())["logits"], expected)
    assert seen == ["layer", "model"]
    blocks(texts())["logits"].sum().backward()


def loss(student: Any, teacher: Any, target: Any) -> Tensor:
    return (student["logits"] - teacher["logits"]).square().mean()


def trained(kind: str, strategy: str, devices: int, **options: Any) -> dict[str, Tensor]:
    student, teacher = (tiny(*KINDS[kind], seed=seed, num_hidden_layers=2) for seed in (1, 2))
    task = ps.Distillation(teacher, student, loss)
    data = [(inputs_for(student, seed=seed), None) for seed in (3, 5)]
    given = {} if strategy == "reference" else {"devices": devices}
    trainer = ps.Trainer(task, optimizer=torch.optim.AdamW, lr=1e-2, strategy=strategy, microbatches=2, **given, **options)
    trainer.fit(data, epochs=1)
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


@pytest.mark.filterwarnings("ignore:the student's 'wav2vec2.masked_spec_embed' got no gradient")  # only SpecAugment uses it
@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("kind", "strategy", "devices"), [("llama", "fill", 2), ("gemma2", "1f1b", 3), ("wav2vec2", "fill", 2)])
def test_distilled_with_padding_as_by_the_plain_loop(kind: str, strategy: str, devices: int) -> None:
    expected, got = trained(kind, "reference", 1), trained(kind, strategy, devices)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("albert", "AlbertForMaskedLM"), r"called in the order 0, 0, 0"),
        (lambda: tiny(*LLAMA, output_hidden_states=True), r"config\.output_hidden_states is set"),
        (lambda: tiny("mixtral", "MixtralForCausalLM", output_router_logits=True), r"config\.output_router_logits is set"),
        (
            lambda: tiny("bart", "BartForConditionalGeneration", encoder_layerdrop=0.1),
            r"encoder_layerdrop skips layers at random",
        ),
        (lambda: tiny("clip", "CLIPModel", text_config=TOWER, vision_config=TOWER), "CLIPModel cannot be called with the inputs"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ps.BlockModel(make())


@pytest.mark.parametrize("name", ["labels", "use_cache", "output_router_logits"])
def test_inputs_that_blocks_cannot_take_are_refused(name: str) -> None:
    blocks = ps.BlockModel(tiny(*LLAMA))
    with pytest.raises(UserError, match=rf"the inputs hold {name} .*take input_ids, attention_mask"):
        blocks({**texts(), name: True})


def test_a_forward_of_ones_own_is_replayed_too() -> None:
    """What it does after the layers is in the head."""

    class Doubled(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return super().forward(input_ids, attention_mask, use_cache=False).logits * 2

    model = Doubled(tiny(*LLAMA).config).eval()
    assert torch.equal(ps.BlockModel(model)(texts()), model(**texts()))


def test_a_layer_that_reads_what_another_layer_left_behind_is_named() -> None:
    """In one process it would be there; in another, what was left behind is that of another batch."""

    class Peeks(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            left: list[Any] = []
            self.model.layers[0].register_forward_hook(lambda layer, args, output: left.append(output))
            self.model.layers[2].register_forward_pre_hook(lambda layer, args: (args[0] + left[-1],))

    with pytest.raises(
        ModelError, match=r"block 'model\.layers\.2' is the first that differs|cannot be cut at 'model\.layers\.2'"
    ):
        ps.BlockModel(Peeks(tiny(*LLAMA).config))


def test_weights_may_change_their_type_after_the_cut() -> None:
    model = tiny(*LLAMA).eval()
    blocks = ps.BlockModel(model)
    model.double()
    with torch.no_grad():
        value: Any = texts()
        for block in blocks.blocks:
            value = block.call(value)
        assert torch.equal(value["logits"], outputs(model, texts()).logits)
        assert value["logits"].dtype == torch.float64


@pytest.mark.parametrize("machine", every_other(["h100:bf16", "a100"]))
def test_costs_are_computed_for_models_without_content(machine: str) -> None:
    """The look at a model when inputs of other names come first is not counted as work of its embeddings."""
    machine_ = Machine.parse(machine)
    ids = torch.zeros(4, 10, dtype=torch.long)
    task = task_without_memory(lambda: ps.Distillation(tiny(*LLAMA), tiny(*LLAMA), ps.losses.SoftTarget()), machine_.dtype)
    inputs, targets = {"input_ids": ids, "position_ids": ids}, {"labels": ids}
    costs = estimate(task, machine_, inputs, targets, rows=4, optimizer=lambda p: torch.optim.SGD(p.values(), lr=0.1))
    embeddings, layer = costs.teacher[0].forward_seconds, costs.teacher[1].forward_seconds
    assert 0 < embeddings < 5 * layer


def test_a_forward_inside_a_context_manager_is_replayed() -> None:
    """The end of a replay passes it, as peft's does around every forward."""

    @contextmanager
    def entered() -> Iterator[None]:
        yield

    class Within(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            with entered():
                return super().forward(input_ids, attention_mask, use_cache=False).logits

    model = Within(tiny(*LLAMA).config).eval()
    blocks, value = ps.BlockModel(model), texts()
    for block in blocks.blocks:
        value = block.call(value)
    assert torch.equal(value, model(**texts()))  # type: ignore[arg-type]
