"""Stages of one rank."""

from typing import Any

import pytest
import torch
from support.cases import CASES, Call, distilled, supervised
from support.models import CLASSES
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.batchnorm import Norms
from pipestill.model.dry_run import dry_run
from pipestill.optim import Schedules
from pipestill.runtime.pipeline.losses import weighted_loss
from pipestill.runtime.pipeline.stage import StudentStage, TeacherStage, gradient_squares, guard_batch
from pipestill.runtime.settings import PipelineSettings

CPU = torch.device("cpu")
SETTINGS = PipelineSettings(
    seed=0, log_every=1, optimizer=lambda parameters: torch.optim.SGD(parameters.values(), lr=0.5),
    schedules=Schedules(0.5, lambda step: 0.5**step), timeout_seconds=30.0, metrics={}, validate=False,
    norms=Norms(), largest_norm=None,
)  # fmt: skip
X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])


def stages(task: Any, *sizes: int) -> list[StudentStage]:
    contracts = dry_run(task, X[:3], Y[:3])
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [StudentStage(task, contracts, range(e - n, e), CPU, SETTINGS) for e, n in zip(ends, sizes, strict=True)]


def through(first: StudentStage, second: StudentStage, rows: slice, unit: int, factor: float) -> None:
    """Forward, loss and backward of one microbatch over two stages."""
    n = len(X[rows])
    out = first.forward(X[rows], [], 0, unit, n, 0)
    contract = first.contracts.student[0][first.blocks[-1]]
    value, gradients = second.enter([t.detach().clone() for t in contract.split(out, n)], n, unit, 0)
    output = second.forward(value, gradients, 0, unit, n, 0)
    second.loss(unit, {unit: output}, {}, Y[rows], 0, [factor])
    first.backward(second.backward(None, 0, unit), 0, unit)


def model() -> ps.Supervised:
    torch.manual_seed(0)
    return supervised(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES))


def test_two_stages_are_one_model() -> None:
    task, factor, microbatches = model(), 1 / len(X), (slice(0, 4), slice(4, 6))
    first, second = stages(task, 2, 2)
    for unit, rows in enumerate(microbatches):
        through(first, second, rows, unit, factor)
    whole = model().student
    sums = [task.loss.sums(whole(X[rows]), Y[rows])["cross_entropy"] for rows in microbatches]
    for one in sums:
        (one * factor).backward()
    for name, parameter in whole.named_parameters():
        assert torch.equal(task.student.get_parameter(name).grad, parameter.grad), name
    expected = sum(float(one.detach().double()) * factor for one in sums)
    assert second.take_losses() == {"cross_entropy": expected}
    assert second.take_losses() == {"cross_entropy": 0.0}
    assert not any([first.stash, second.stash, first.from_loss, second.from_loss])


def test_update_scales_every_groups_rate() -> None:
    task = model()
    (stage,) = stages(task, 4)
    weight = task.student[0].weight
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    stage.update(2)
    assert torch.equal(weight, before - 0.5 * 0.25)
    assert weight.grad is None


def test_a_stage_without_parameters_has_no_optimizer() -> None:
    task = supervised(nn.Linear(4, CLASSES), nn.Tanh())
    _, second = stages(task, 1, 1)
    assert second.trained.optimizer is None
    second.update(0)


def test_frozen_parameters_are_not_the_optimizers() -> None:
    task = CASES["frozen_between"].task()
    for stage in stages(task, 1, 2, 2):
        names = [name for name, p in task.student_blocks.parameters_of(stage.blocks).items() if p.requires_grad]
        assert list(stage.parameters) == names
        assert (stage.trained.optimizer is None) == (not names)


def test_gradients_of_something_else_are_dropped() -> None:
    task = model()
    task.student(X).sum().backward()
    stages(task, 4)
    assert all(p.grad is None for p in task.student.parameters())


@pytest.mark.filterwarnings("ignore:the student's '0.b.weight', '0.b.bias' got no gradient")
@pytest.mark.parametrize("uses", [True, False])
def test_a_model_that_chooses_per_batch_what_it_uses_is_refused(uses: bool) -> None:
    """A gradient that nobody sends would be missing without a word."""
    used = [not uses]
    task = supervised(
        Call(lambda self, x: (self.a(x), self.b(x)), a=nn.Linear(4, 8), b=nn.Linear(4, 8)),
        Call(lambda self, v: self.c(v[0] + v[1] if used[0] else v[0]), c=nn.Linear(8, CLASSES)),
    )
    first, second = stages(task, 1, 1)
    used[0] = uses
    with pytest.raises(ModelError, match=f"{'a' if uses else 'no'} gradient came back for an input that had"):
        through(first, second, slice(0, 3), 0, 1.0)


def test_a_loss_with_other_parts_is_refused() -> None:
    def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"many" if len(output) > 3 else "few": output.sum()}

    (stage,) = stages(ps.Supervised(nn.Sequential(nn.Linear(4, 4)), loss), 1)
    with pytest.raises(ModelError, match="the loss had the parts few on the sample batch and now has many"):
        stage.loss(0, {0: stage.forward(X, [], 0, 0, 6, 0)}, {}, Y, 0, [1.0])


def test_infer_is_in_eval_mode_and_forward_in_train_mode() -> None:
    task = supervised(nn.Linear(4, CLASSES), nn.Dropout(0.9))
    (stage,) = stages(task, 2)
    quiet = stage.infer(X, 0, 0)
    assert not quiet.requires_grad
    assert (quiet != 0).all()
    assert (stage.forward(X, [], 0, 0, 6, 0) == 0).any()
    assert torch.equal(stage.infer(X, 3, 4), quiet)


def test_the_teacher_has_no_graph_and_is_in_eval_mode() -> None:
    task = distilled(nn.Linear(4, CLASSES))
    task.teacher.train()
    stage = TeacherStage(task, dry_run(task, X[:3], Y[:3]), range(4), CPU, SETTINGS)
    assert not stage.forward(X, 0, 0).output.requires_grad
    assert not any(module.training for module in task.teacher.modules())


def test_guard_batch() -> None:
    x = torch.zeros(6, 4)
    unchanged = guard_batch({"x": x[:3]})
    unchanged("student")
    x[:3].add_(1)
    with pytest.raises(ModelError, match="the first block of the student changes its input in place"):
        unchanged("student")


def test_weighted_loss() -> None:
    parts = {"a": torch.tensor(1.0), "b": torch.tensor(2.5)}
    assert weighted_loss(parts, [0.5, 0.5]).item() == 1.75
    assert weighted_loss({"a": torch.tensor(3.0)}, [0.5]).item() == 1.5


def test_gradient_squares() -> None:
    layer = nn.Linear(2, 2).to(torch.bfloat16)
    layer.weight.grad = torch.full((2, 2), 3.0, dtype=torch.bfloat16)
    squares = gradient_squares(layer.parameters())
    assert squares.dtype == torch.float64
    assert squares.tolist() == pytest.approx([36.0, 0.0])
    assert gradient_squares([]).tolist() == []
