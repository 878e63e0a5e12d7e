"""The tiny step before a run: what it learns, what it refuses, and that it leaves no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import CASES, Average, Call, distilled, linears, supervised
from support.models import CLASSES, distillation, images
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import DataError, ModelError, UserError
from pipestill.model.contracts import TensorLeaf
from pipestill.model.dry_run import dry_run

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


def test_it_leaves_no_trace() -> None:
    task = distillation()
    x, y = images()[0]
    task.student(x).sum().backward()
    task.student.eval()
    task.student[0][1].train()
    task.teacher.train()
    task.teacher[0].weight.requires_grad_(False)
    before = {
        role: [
            {n: t.clone() for n, t in model.state_dict().items()},
            {n: (id(p.grad), p.grad if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
        ]
        for role, model in (("student", task.student), ("teacher", task.teacher))
    }
    seed, batch = torch.random.get_rng_state(), (x.clone(), y.clone())
    dry_run(task, x, y)
    for role, model in (("student", task.student), ("teacher", task.teacher)):
        state, gradients, modes, trained = before[role]
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        for name, parameter in model.named_parameters():
            identity, gradient = gradients[name]
            assert id(parameter.grad) == identity
            assert gradient is None or torch.equal(parameter.grad, gradient)
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert torch.equal(x, batch[0]) and torch.equal(y, batch[1])


def test_buffers_that_a_forward_replaces_are_put_back() -> None:
    task = supervised(nn.Linear(4, 8), Average(), nn.Linear(8, CLASSES))
    mean = task.student[1].mean
    dry_run(task, X, Y)
    assert task.student[1].mean is mean
    assert not mean.any()
    assert task.student[1].count is None


def test_buffers_of_the_loss_are_put_back() -> None:
    task = CASES["centered_loss"].task()
    dry_run(task, X, Y)
    assert not task.loss.center.any()


def test_contracts_say_what_travels() -> None:
    contracts = dry_run(CASES["dictionaries"].task(), X, Y)
    assert contracts.loss_parts == ("soft_target", "cross_entropy")
    (student,), (teacher,) = contracts.student, contracts.teacher
    assert len(student) == 4 and len(teacher) == 4
    leaves = [leaf for leaf in student[0].leaves if isinstance(leaf, TensorLeaf)]
    assert [(leaf.tracked, leaf.gradient is not None) for leaf in leaves] == [(True, True), (False, False), (True, True)]
    assert student[-1].values[0].shape_of(7) == (7, CLASSES)
    assert not any(leaf.tracked for contract in teacher for leaf in contract.tensor_leaves)
    assert [form.shape_of(5) for form in contracts.inputs.values + contracts.targets.values] == [(5, 4), (5,)]


def test_frozen_blocks_get_no_gradient() -> None:
    contracts = dry_run(CASES["frozen_first"].task(), X, Y)
    assert [len(contract.gradients) for contract in contracts.student[0]] == [0, 0, 0, 0, 1, 1, 1]


def test_gradients_keep_their_strides() -> None:
    contracts = dry_run(CASES["turned"].task(), X, Y)
    value, gradient = contracts.student[0][0].values[0], contracts.student[0][0].gradients[0]
    assert value.order(5) == [0, 1]
    assert gradient.order(5) == [1, 0]


def test_one_row_is_enough() -> None:
    contracts = dry_run(distilled(*linears(4, 8, CLASSES)), X[:1], Y[:1])
    assert contracts.student[0][0].values[0].shape_of(9) == (9, 8)


def broken(function: Callable[..., Any]) -> ps.Supervised:
    return supervised(nn.Linear(4, 8), Call(function), nn.Linear(8, CLASSES))


def fails(self: Any, x: Tensor) -> Tensor:
    raise KeyError("inside")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: supervised(nn.Linear(4, 8), nn.Linear(9, 8)), r"student block 1 \('1'\) cannot take float32\[2, 8\]: Runtime"),
        (lambda: broken(fails), r"student block 1 \('1'\) cannot take float32\[2, 8\]: KeyError: 'inside'"),
        (
            lambda: ps.Distillation(
                nn.Linear(5, 8), nn.Linear(4, 8), ps.losses.LogitsMSE(), teacher_cuts=[""], student_cuts=[""]
            ),
            r"teacher block 0 \(''\) cannot take float32\[2, 4\]",
        ),
        (
            lambda: distilled(nn.Linear(4, CLASSES + 1)),
            rf"the loss cannot take student output float32\[2, {CLASSES + 1}\], teacher output float32\[2, {CLASSES}\], "
            r"target int64\[2\]: .*; make the outputs fit each other, or choose another loss",
        ),
        (lambda: ps.Supervised(nn.Sequential(nn.Linear(4, 8)), lambda x, y: x), "the loss gave a tensor of shape .* as 'loss'"),
        (lambda: ps.Supervised(nn.Sequential(nn.Linear(4, 8)), lambda x, y: {"a": 1.0}), "the loss gave 1.0 as 'a'"),
        (lambda: ps.Supervised(nn.Sequential(nn.Linear(4, 8)), lambda x, y: {}), "the loss gave no part"),
        (
            lambda: supervised(nn.Linear(4, CLASSES).requires_grad_(False)),
            "the loss does not depend on any trained parameter of the student; nothing would be learnt",
        ),
        (
            lambda: supervised(nn.Linear(4, 8), nn.Sigmoid(), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)),
            r"the backward of student block 1 \('1'\) fails: .*modified by an inplace operation",
        ),
        (lambda: broken(lambda self, x: x[x[:, 0] > x[:, 0].mean()]), "the loss cannot take"),
    ],
)
def test_what_cannot_work_is_refused(task: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        dry_run(task(), X, Y)


def test_rows_of_inputs_and_targets_must_agree() -> None:
    with pytest.raises(UserError, match="3 rows of inputs and 2 of targets"):
        dry_run(supervised(nn.Linear(4, CLASSES)), X, Y[:2])
    with pytest.raises(DataError, match="first axis"):
        dry_run(supervised(nn.Linear(4, CLASSES)), torch.zeros(()), Y)


X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


def test_a_block_names_all_that_it_trains() -> None:
    """Otherwise another rank would train a copy that nobody ever sees."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.scale = nn.Linear(4, 8), nn.Linear(8, CLASSES), nn.Parameter(torch.ones(8))

        def pipeline_blocks(self) -> list[ps.Block]:
            return [
                ps.Block("first", lambda x: self.first(x) * self.scale, ("first", "scale")),
                ps.Block("last", lambda x: self.last(x * self.scale), ("last",)),
            ]

    task = ps.Supervised(Model(), ps.losses.cross_entropy)
    with pytest.raises(ModelError, match=r"student block 1 \('last'\) trains 'scale' without naming them in its `uses`"):
        dry_run(task, X, Y)
    task.student.scale.requires_grad_(False)
    dry_run(task, X, Y)  # what nobody trains is the same in every copy


class _ForwardDoesMore(nn.Module):
    """Its forward has a ReLU that no block has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def pipeline_blocks(self) -> list[str]:
        return ["first", "second"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_work_that_only_the_forward_does_is_not_dropped_in_silence() -> None:
    task = ps.Supervised(_ForwardDoesMore(), lambda output, target: output.square().mean())
    with pytest.raises(ModelError, match=r"do not give what _ForwardDoesMore.forward gives"):
        dry_run(task, torch.randn(4, 3), None)
