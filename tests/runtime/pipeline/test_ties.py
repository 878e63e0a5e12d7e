"""Weights that several stages have in common: one gradient, one norm, one optimizer state, on any partition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pairwise import every_other
from torch import Tensor, nn

import pipestill as ps
from pipestill.model.blocks import BlockModel
from pipestill.runtime.pipeline.ties import TiedWeights, counted_once, gradient_forms, tied_blocks
from pipestill.schedule import Action, check, generate


def tied(seed: int = 0) -> nn.Sequential:
    """Ids -> words, with one table of embeddings in blocks 0, 2 and 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        table = nn.Embedding(11, 8)
        model = nn.Sequential(table, nn.Linear(8, 8), nn.Linear(8, 11, bias=False), nn.Linear(11, 8), nn.Linear(8, 11))
    model[2].weight = model[4].weight = table.weight
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(11, (6, 5), generator=generator) for _ in range(3)]
    return [(rows, rows.roll(1, 1)) for rows in ids]


def loss(student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
    ce = nn.functional.cross_entropy(student.flatten(0, 1), target.flatten())
    return {"ce": ce, "mse": (student - teacher).square().mean()}


def trained(strategy: str, partition: list[int] | None = None, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    student, norms = tied(1), list[float]()

    class Norms(ps.Callback):
        def step(self, values: dict[str, float]) -> None:
            norms.append(values["grad_norm"])

    given = {} if partition is None else {"devices": len(partition), "student_partition": partition}
    trainer = ps.Trainer(
        ps.Distillation(tied(2), student, loss), optimizer=torch.optim.AdamW, lr=0.05, strategy=strategy, microbatches=3,
        callbacks=[Norms()], log_every=1, **given, **options,
    )  # fmt: skip
    trainer.fit(batches(), epochs=2)
    assert student[4].weight is student[0].weight
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}, norms


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(
    ("partition", "clip"),
    every_other(
        [
            ([4, 1], 0.3),
            ([4, 1], None),
            ([2, 3], None),
            ([2, 3], 0.3),
            ([1, 2, 2], 0.3),
            ([1, 2, 2], None),
            ([1] * 5, None),
            ([1] * 5, 0.3),
        ]
    ),
)
def test_tied_weights_on_several_stages_as_in_the_plain_loop(partition: list[int], clip: float | None) -> None:
    """Weights, and the norm of all gradients, in which a tied weight counts once."""
    expected, norms = trained("reference", clip_grad_norm=clip)
    got, got_norms = trained("1f1b" if len(partition) == 2 else "fill", partition, clip_grad_norm=clip)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    assert got_norms == pytest.approx(norms, rel=1e-12)


def processes(partition: list[int]) -> Any:
    return trained("1f1b", partition, clip_grad_norm=0.3)[0]


def test_tied_weights_in_processes_as_in_the_plain_loop() -> None:
    expected, _ = trained("reference", clip_grad_norm=0.3)
    got = ps.launch(processes, ([2, 3],), 2, threads=1, timeout_seconds=60.0)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_each_block_has_a_gradient_of_its_own_until_they_are_added_up() -> None:
    blocks = BlockModel(tied())
    assert tied_blocks(blocks) == {"0.weight": (0, 2, 4)}
    first, last = TiedWeights(blocks, range(3)), TiedWeights(blocks, range(3, 5))
    weight = blocks.model.get_parameter("0.weight")
    assert first.weights["0.weight"] is weight
    assert last.weights["0.weight"] is not weight
    assert (first.counted_elsewhere, last.counted_elsewhere) == (set(), {"0.weight"})
    for number, (stage, block) in enumerate([(first, 0), (first, 2), (last, 4)]):
        with stage.of(block):
            blocks.model[4].weight.mul(10.0**number).sum().backward()
    assert blocks.model[4].weight is weight
    assert [float(g[0, 0]) for g in (*first.gradients(), *last.gradients())] == [1.0, 10.0, 100.0]
    given = {range(3): first.gradients(), range(3, 5): last.gradients()}
    for stage in (first, last):
        stage.add_up(given)
        assert float(stage.weights["0.weight"].grad[0, 0]) == 111.0
    assert [float(g.sum()) for g in first.gradients()] == [0.0, 0.0]


def test_forms_and_counts() -> None:
    blocks = BlockModel(tied())
    assert gradient_forms(blocks, range(3)) == [(torch.Size([11, 8]), torch.float32)] * 2
    assert [len(stage) for stage in counted_once(blocks, [range(3), range(3, 5)])] == [3, 3]


@pytest.mark.parametrize("strategy", ["sequential", "gpipe", "1f1b"])
@pytest.mark.parametrize("clip", [False, True])
def test_every_update_waits_for_the_gradients_of_both_stages(strategy: str, clip: bool) -> None:
    schedule = generate(strategy, 3, 2, ties=(0, 2), clip=clip)
    check(schedule)
    message = Action.parse("S0G@0>2"), Action.parse("S2G@0>0")
    assert message[0] in schedule.rows[0] and message[1] in schedule.rows[2]
    assert not any(action.op.name == "GATHER" for action in schedule.rows[1])
