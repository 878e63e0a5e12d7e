"""Heads inside the loss: the same training as with logits, hidden states at the boundary, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fits import Listener, unit_costs
from torch import Tensor, nn

import pipestill as ps
from pipestill.model.dry_run import dry_run

WORDS = 13


class Words(nn.Module):
    """A model of words that gives a dict, as those of `transformers` do."""

    def __init__(self, width: int, *, softcap: float | None = None, scale: float = 1.0, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, WORDS, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.config = type("Config", (), {"final_logit_softcapping": softcap, "logits_scaling": 1 / scale})()

    def pipeline_blocks(self) -> list[str | ps.Block]:
        return ["embedding", "layer", ps.Block("head", self.last, ("head",))]

    def last(self, hidden: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(hidden)) / self.config.logits_scaling
        if self.config.final_logit_softcapping is not None:
            logits = self.config.final_logit_softcapping * torch.tanh(logits / self.config.final_logit_softcapping)
        return {"last_hidden_state": hidden, "logits": logits}

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return self.last(self.layer(self.embedding(ids)))


def plain(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(WORDS, width), nn.Linear(width, width), nn.Linear(width, WORDS))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(WORDS, (2, 6, 5), generator=generator) for _ in range(3)]
    return [(ids, torch.where(torch.arange(5) < 4, labels, -100)) for ids, labels in made]


def accuracy(output: Any, target: Tensor) -> Tensor:
    logits = ps.losses.logits_of(output)
    assert isinstance(logits, Tensor)
    return (logits.argmax(-1) == target).double().mean()


PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "sequential": lambda: (plain(8), plain(4)),
    "dicts": lambda: (Words(8), Words(4)),
    "softcap and scale": lambda: (Words(8, softcap=2.0), Words(4, softcap=3.0, scale=0.5)),
    "tied": lambda: (Words(8, tied=True), Words(4, tied=True)),
}


def trained(pair: str, fuse_heads: bool, **trainer: Any) -> tuple[dict[str, Tensor], Listener]:
    torch.manual_seed(0)
    teacher, student = PAIRS[pair]()
    task = ps.Distillation(teacher, student, ps.losses.SoftTarget(2.0, 0.5), fuse_heads=fuse_heads)
    listener = Listener()
    options = {"lr": 0.5, "microbatches": 2, "log_every": 1, "costs": unit_costs(task), "device": "cpu", **trainer}
    ps.Trainer(task, callbacks=[listener], metrics={"accuracy": accuracy}, **options).fit(batches(), validate=batches())
    return dict(student.state_dict()), listener


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize("pair", PAIRS)
def test_trains_as_with_logits(pair: str) -> None:
    expected, steps = trained(pair, fuse_heads=False)
    found, fused_steps = trained(pair, fuse_heads=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [step["loss"] for step in fused_steps.steps] == pytest.approx([step["loss"] for step in steps.steps], rel=1e-5)
    assert fused_steps.validations == steps.validations
    assert any(not torch.equal(tensor, dict(PAIRS[pair]()[1].state_dict())[name]) for name, tensor in found.items())


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(
    ("pair", "strategy", "devices"), [("sequential", "fill", 3), ("dicts", "1f1b", 2), ("dicts", "gpipe", 3)]
)
def test_every_strategy_equals_the_plain_loop(pair: str, strategy: str, devices: int) -> None:
    """A stage may be the head alone, which then gives what it gets."""
    expected, steps = trained(pair, fuse_heads=True, strategy="reference")
    for knobs in ({"split_backward": False}, {"split_backward": True}) if strategy == "fill" else ({},):
        found, others = trained(pair, fuse_heads=True, strategy=strategy, devices=devices, **knobs)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert [step["loss"] for step in others.steps] == [step["loss"] for step in steps.steps]


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize("devices", [1, 2])
def test_tokens_that_count_otherwise_than_labels_have_one_loss_too(devices: int) -> None:
    """The two parts then have factors of their own, whatever the microbatches."""
    (ids, labels), *_ = batches()
    tokens = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    target = {"labels": labels, "tokens": tokens}
    found = []
    for fuse_heads, microbatches in ((False, 1), (True, 1), (True, 4)):
        torch.manual_seed(0)
        teacher, student = Words(8), Words(4)
        task = ps.Distillation(teacher, student, ps.losses.ReverseKL(2.0, kd_ratio=0.5), fuse_heads=fuse_heads)
        options = {"microbatches": microbatches, "devices": devices, "costs": unit_costs(task), "device": "cpu"}
        ps.Trainer(task, lr=0.5, **options).fit([(ids, target)])  # type: ignore[arg-type]
        found.append(student.state_dict())
    for fused in found[1:]:
        torch.testing.assert_close(fused, found[0], rtol=1e-5, atol=1e-6)


def test_a_model_of_transformers_has_its_head_fused() -> None:
    transformers = pytest.importorskip("transformers")

    def gpt2(width: int) -> nn.Module:
        sizes = {"vocab_size": WORDS, "n_positions": 16, "n_embd": width, "n_layer": 1, "n_head": 2}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
        )  # type: ignore[no-any-return]

    found = []
    for fuse_heads in (False, True):
        torch.manual_seed(0)
        task = ps.Distillation(gpt2(8), gpt2(4), ps.losses.SoftTarget(2.0, 0.5), fuse_heads=fuse_heads)
        task.student.eval()
        ps.Trainer(task, lr=0.5, microbatches=2, costs=unit_costs(task), device="cpu").fit(batches())
        found.append(task.student.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_hidden_states_travel_in_place_of_logits() -> None:
    task = ps.Distillation(Words(8), Words(4), ps.losses.SoftTarget(), fuse_heads=True)
    contracts = dry_run(task, *batches()[0])
    for model, width in ((contracts.student, 4), (contracts.teacher, 8)):
        assert model[0][-1].num_bytes(rows=1) == 2 * 4 * 5 * width, "the last hidden state, and what the head gets"
    assert contracts.loss_parts == ("soft_target", "cross_entropy")


def test_the_model_itself_stays_as_it_is() -> None:
    torch.manual_seed(0)
    student = Words(4)
    ids = batches()[0][0]
    before, names = student(ids)["logits"], list(student.state_dict())
    ps.Distillation(Words(8), student, ps.losses.SoftTarget(), fuse_heads=True)
    torch.testing.assert_close(student(ids)["logits"], before)
    assert list(student.state_dict()) == names


class Masked(Words):
    """It forbids a word after its head."""

    def last(self, hidden: Tensor) -> dict[str, Tensor]:
        found = super().last(hidden)
        return {**found, "logits": found["logits"] - 5.0 * (torch.arange(found["logits"].shape[-1]) == 3)}


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, WORDS)]))


class Twice(Words):
    """It applies its head twice."""

    def last(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(hidden) + self.head(hidden)}


def hooked() -> nn.Module:
    model = Words(4)
    model.head.register_forward_hook(lambda layer, given, output: None)
    return model


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            lambda: nn.Sequential(nn.Embedding(WORDS, 4), nn.LayerNorm(4)),
            "the student's logits in its last block .* there is none",
        ),
        (two_linears, r"there is '1.0' \(Linear\), '1.1' \(Linear\); cut the model so that its head is its last block"),
        (hooked, "the student's head 'head' has hooks"),
        (lambda: Masked(4), "the student's logits are not what its head 'head' alone gives"),
        (lambda: Twice(4), "the student's last block .*head.* applies its head 'head' 2 times"),
    ],
)
def test_heads_that_cannot_be_fused_are_refused(student: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ps.UserError, match=message):
        dry_run(ps.Distillation(Words(8), student(), ps.losses.SoftTarget(), fuse_heads=True), *batches()[0])


@pytest.mark.parametrize("loss", [ps.losses.Cosine(), lambda student, teacher, target: student.mean()])
def test_a_loss_that_cannot_apply_heads_is_refused(loss: Any) -> None:
    with pytest.raises(ps.UserError, match="fuse_heads needs a loss that applies heads itself, such as ps.losses.SoftTarget"):
        ps.Distillation(Words(8), Words(4), loss, fuse_heads=True)


def test_fuse_heads_is_true_or_false() -> None:
    with pytest.raises(ps.UserError, match="fuse_heads is 'yes'; expected True or False"):
        ps.Distillation(Words(8), Words(4), ps.losses.SoftTarget(), fuse_heads="yes")  # type: ignore[arg-type]
