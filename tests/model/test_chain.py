"""Blocks that are not the model are noticed: what they leave out, and what nothing trains."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.dry_run import dry_run

IDS = {"input_ids": torch.randint(11, (3, 6)), "scale": torch.ones(3, 1, 1)}


class Keywords(nn.Module):
    """Its forward takes keywords and gives a dict; its blocks leave out the final norm where they are told to."""

    def __init__(self, blocks_norm: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)
        nn.init.constant_(self.norm.bias, 1.0)
        self.blocks_norm = blocks_norm

    def forward(self, input_ids: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(input_ids) if scale is None else self.embed(input_ids) * scale
        return {"logits": self.head(self.norm(hidden)), "hidden": hidden}

    def pipeline_blocks(self) -> list[ps.Block]:
        def head(hidden: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.norm(hidden) if self.blocks_norm else hidden)}

        def embed(inputs: dict[str, Any]) -> Tensor:
            return self.embed(inputs["input_ids"]) * inputs["scale"]  # type: ignore[no-any-return]

        return [ps.Block("embed", embed, ("embed",)), ps.Block("head", head, ("norm", "head"))]


def task_of(blocks_norm: bool) -> ps.Supervised:
    return ps.Supervised(Keywords(blocks_norm), lambda output, target: output["logits"].square().mean())


@pytest.mark.filterwarnings("ignore:the student's")
def test_a_final_norm_that_blocks_leave_out_is_noticed_where_the_forward_takes_keywords() -> None:
    with pytest.raises(ModelError, match=r"the student's blocks \(embed, head\), .* do not give what Keywords.forward gives"):
        dry_run(task_of(False), IDS, None)


def test_a_parameter_that_nothing_trains_is_told() -> None:
    task = task_of(False)
    with pytest.warns(UserWarning, match=r"the student's 'norm.weight', 'norm.bias' got no gradient"), pytest.raises(ModelError):
        dry_run(task, IDS, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dry_run(task_of(True), IDS, None)


def test_a_forward_that_fails_where_its_blocks_do_not_is_told() -> None:
    task = task_of(True)
    task.student.forward = lambda input_ids, scale: input_ids @ scale
    with pytest.raises(ModelError, match=r"Keywords.forward, whose work they should do, does not: RuntimeError"):
        dry_run(task, IDS, None)


def test_a_forward_with_other_arguments_is_not_compared() -> None:
    task = task_of(True)
    for forward in (lambda tokens: tokens.sum(), lambda tokens, more: tokens):
        task.student.forward = forward
        dry_run(task, IDS, None)


def test_packed_sequences_are_compared_as_training_runs_them() -> None:
    """With a cache, which a forward of transformers makes by itself, packed examples would attend to each other."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes))
    positions = torch.tensor([0, 1, 2, 0, 1, 2]).expand(3, -1)
    task = ps.Supervised(model, ps.losses.cross_entropy)
    dry_run(task, {"input_ids": IDS["input_ids"], "position_ids": positions}, IDS["input_ids"])
    assert model.config.use_cache
