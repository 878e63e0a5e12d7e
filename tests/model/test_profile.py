"""What blocks cost, measured without changing them. No test here depends on how long anything takes."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from support.models import distillation, images
from torch import nn

from pipestill.costs import Costs, Link
from pipestill.losses import cross_entropy
from pipestill.model.blocks import BlockModel
from pipestill.model.dry_run import dry_run
from pipestill.model.measure import Stopwatch
from pipestill.model.profile import microbatch_of, profile, wake_seconds, weight_fractions
from pipestill.model.tasks import Supervised


def measure(task: object, rows: int = 6) -> Costs:
    x, y = images()[0]
    few = (x[:3], y[:3])
    contracts = dry_run(task, *few)  # type: ignore[arg-type]
    made: list[list[str]] = []

    def optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        made.append(list(parameters))
        return torch.optim.AdamW(parameters.values())

    costs = profile(
        task,
        contracts,
        *few,
        rows=rows,
        optimizer=optimizer,
        repeats=2,
        link=Link(1.0, 2.0),
        interference=1.5,  # type: ignore[arg-type]
    )
    assert made == [
        [n for n, p in b.items() if p.requires_grad] for b in blocks(task) if any(p.requires_grad for p in b.values())
    ]
    return costs


def blocks(task: object) -> list[dict[str, nn.Parameter]]:
    model = task.student_blocks  # type: ignore[attr-defined]
    return [model.parameters_of(range(i, i + 1)) for i in range(len(model))]


def test_every_block_has_its_costs() -> None:
    task = distillation()
    costs = measure(task)
    assert [b.name for b in costs.student] == [b.name for b in task.student_blocks.blocks]
    assert task.teacher_blocks is not None
    assert [b.name for b in costs.teacher] == [b.name for b in task.teacher_blocks.blocks]
    assert costs.rows == 6 and costs.link == Link(1.0, 2.0) and costs.interference == 1.5
    assert all(b.forward_seconds > 0 for b in costs.student + costs.teacher)
    assert all(b.backward_seconds > 0 for b in costs.student)
    assert costs.loss_seconds > 0
    assert [b.update_seconds > 0 for b in costs.student] == [bool(parameters) for parameters in blocks(task)]
    assert not any(b.backward_seconds or b.update_seconds for b in costs.teacher)
    assert [b.parameter_bytes for b in costs.student] == [4 * sum(p.numel() for p in b.values()) for b in blocks(task)]
    assert [b.output_bytes for b in costs.student[:2]] == [4 * 6 * 6 * 16, 4 * 6 * 6 * 16]


def test_a_frozen_block_is_not_updated() -> None:
    task = distillation()
    task.student[0].requires_grad_(False)
    assert measure(task).student[0].update_seconds == 0


def test_nothing_changes() -> None:
    task = distillation()
    models = (task.student, task.teacher)
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    seed = torch.random.get_rng_state()
    measure(task)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_work_after_a_nap_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only work moves: a piece takes a second, and a quarter more after the core has slept."""
    now, cold, naps = 0.0, False, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal cold
        cold = True
        naps.append(seconds)

    def step(task: object, inputs: object, targets: object, mark: Callable[[str, int], None]) -> None:
        nonlocal now, cold
        for piece in range(9):
            now, cold = now + (1.25 if cold else 1.0), False
            mark("piece", piece)

    monkeypatch.setattr("pipestill.model.profile.stepwise", step)
    monkeypatch.setattr("pipestill.model.measure.now", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    task, (x, y) = distillation(), images()[0]
    assert len(task.student_blocks) > 2
    slower = wake_seconds(task, x, y, rows=6, num_stages=len(task.student_blocks), nap_seconds=0.5, repeats=3)
    assert slower == 0.25
    assert naps == [0.5] * 3 * 8  # after each piece but the last


def test_what_blocks_keep_for_their_backward_is_counted_once() -> None:
    """Linear layers keep their input, a ReLU its output; the last layer's input is that output."""
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    task = Supervised(layers, cross_entropy)
    few = (torch.rand(3, 8), torch.tensor([0, 1, 2]))
    costs = profile(task, dry_run(task, *few), *few, rows=5, optimizer=lambda p: torch.optim.SGD(p.values(), 0.1), repeats=1)
    assert [b.stash_bytes for b in costs.student] == [4 * 5 * 8, 4 * 5 * 16, 0]
    assert [b.training_bytes for b in costs.student] == [b.parameter_bytes for b in costs.student], "gradients"


def test_a_microbatch_begins_again_where_the_sample_is_short() -> None:
    inputs, targets = microbatch_of({"x": torch.arange(3)}, (torch.arange(3) * 10,), 5)
    assert inputs["x"].tolist() == [0, 1, 2, 0, 1]
    assert targets[0].tolist() == [0, 10, 20, 0, 10]


def halves() -> nullcontext[Stopwatch]:
    """A clock by which the first half of a backward takes one second, and the second three."""
    return nullcontext(Stopwatch(iter([0.0, 1.0, 1.0, 4.0, 4.0]).__next__))


def test_fractions_of_backwards_that_weights_take() -> None:
    """All of the first block's; of a block that writes to its input too; none of one that stays whole or cannot be halved."""
    two_weights = nn.Linear(4, 4)
    model = BlockModel(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 4), Twice(two_weights))
    )
    outputs = [torch.randn(2, 4).requires_grad_() * 1 for _ in range(5)]
    found = weight_fractions(model, outputs, halves, repeats=2, whole={3})
    assert found == [1.0, 0.75, 0.75, 0.0, 0.0]


class Twice(nn.Module):
    """A layer that is used twice, whose weights' gradients cannot be taken apart."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x))
