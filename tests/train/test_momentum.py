"""Momentum teachers: every strategy gives the same student and teacher as a plain loop that reads what it declares to read."""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fits import Case, Outcome, assert_same, unit_costs
from support.momentum import MOMENTUM_CASES, TWO, WIDTH, encoder, images_in_views, info_nce, momentum_task, run_momentum
from torch import Tensor, nn

import pipestill as ps
from pipestill.costs import Costs
from pipestill.errors import DataError, ModelError, PlanError, UserError

MICROBATCHES = 3
EXACT, STALE, STALE_HALVES, ASYNC = (0, 0, 3), (1, 0, 3), (1, 0, 6), (1, 1, 3)
"""What a strategy promises: the teacher's staleness, the student's, and into how many microbatches a batch is cut."""

SPLIT = {"split_backward": True}
EXACT_ONES: list[tuple[str, dict[str, Any]]] = [
    ("sequential", {}),
    ("gpipe", {}),
    ("1f1b", {}),
    *(("fill", {**split, "stash": stash}) for split in ({}, SPLIT) for stash in ("n", "2n-1", "all")),
]
STALE_ONES: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("fill", {"staleness": 1}, STALE),
    ("fill", {"staleness": 1, "stash": "n", **SPLIT}, STALE),
    ("fill", {"staleness": 1, "stash": "all", **SPLIT}, STALE),
    ("tspipe", {}, STALE_HALVES),
    ("async", {}, ASYNC),
]
EVERY_ONE = [*((strategy, knobs, EXACT) for strategy, knobs in EXACT_ONES), *STALE_ONES]
SOME = [(EVERY_ONE[i], devices) for i, devices in ((2, 3), (7, 2), (10, 3), (12, 3), (13, 2))]
"""1F1B, fill with split backwards, and what is stale, on 2 or 3 devices."""


def name_of(value: Any) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@cache
def reference(name: str, promise: tuple[int, int, int] = EXACT) -> Outcome:
    staleness, student_staleness, microbatches = promise
    return MOMENTUM_CASES[name].run(
        "reference", staleness=staleness, student_staleness=student_staleness, microbatches=microbatches
    )


def assert_trains_the_same(got: Outcome, expected: Outcome) -> None:
    """Weights and buffers of both models, losses and norms of all steps."""
    assert any(name.startswith("teacher ") for name in got.state)
    assert_same(got, expected)


def every_one_by_devices() -> Iterator[Any]:
    """Every strategy on 2, 3 or 4 devices, in turn; on the other numbers of devices it is slow."""
    for number, (strategy, knobs, promise) in enumerate(EVERY_ONE):
        for devices in (1, 2, 3, 4):
            marks = () if devices == 2 + number % 3 else pytest.mark.slow
            yield pytest.param(strategy, knobs, promise, devices, marks=marks)


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("strategy", "knobs", "promise", "devices"), list(every_one_by_devices()), ids=name_of)
def test_every_strategy(strategy: str, knobs: dict[str, Any], promise: tuple[int, int, int], devices: int) -> None:
    assert_trains_the_same(MOMENTUM_CASES["byol"].run(strategy, devices, **knobs), reference("byol", promise))


@pytest.mark.parametrize(("knobs", "promise"), [({}, EXACT), (SPLIT, EXACT), ({"staleness": 1}, STALE)], ids=name_of)
def test_what_the_search_finds(knobs: dict[str, Any], promise: tuple[int, int, int]) -> None:
    assert_trains_the_same(MOMENTUM_CASES["byol"].run("fill", 3, **knobs), reference("byol", promise))


def case_by_some() -> Iterator[Any]:
    """Every peculiar task by two of the strategies, in turn; by the others it is slow."""
    for number, case in enumerate(case for case in MOMENTUM_CASES if case != "byol"):
        for place, (one, devices) in enumerate(SOME):
            always = (place - number) % len(SOME) == 0
            yield pytest.param(case, *one, devices, marks=() if always else pytest.mark.slow)


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("case", "strategy", "knobs", "promise", "devices"), list(case_by_some()), ids=name_of)
def test_peculiar_tasks(case: str, strategy: str, knobs: dict[str, Any], promise: tuple[int, int, int], devices: int) -> None:
    if promise != EXACT and "copied" in case:
        with pytest.raises(PlanError, match="teacher_buffers='own'"):
            MOMENTUM_CASES[case].run(strategy, devices, **knobs)
        return
    assert_trains_the_same(MOMENTUM_CASES[case].run(strategy, devices, **knobs), reference(case, promise))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if number % 3 else ())
        for number, case in enumerate(case for case in MOMENTUM_CASES if "copied" not in case)
    ],
)
def test_the_proofs_can_fail(case: str) -> None:
    """Each kind of staleness, and each number of microbatches, gives other weights: a mix-up could not pass."""
    promises = [EXACT, STALE, STALE_HALVES, ASYNC]
    first = "0.weight" if case not in ("frozen", "new_buffers", "new_buffers_copied") else "1.weight"
    first = "2.parts.0.weight" if case == "frozen" else first
    weights = [reference(case, promise).state[first] for promise in promises]
    for i, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[i + 1 :])


PROCESS_CASES = ("byol", "crops", "clipped_adamw_info_nce", "frozen", "copied_buffers", "new_buffers")


@pytest.mark.parametrize(
    ("devices", "most"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_processes(devices: int, most: int) -> None:
    """One process per rank; all runs one after the other in the same group, at `most` two strategies a case."""
    runs = [
        (case, *EVERY_ONE[(2 * i + j) % len(EVERY_ONE)])
        for i, case in enumerate(PROCESS_CASES)
        for j in ((0, 9) if most == 2 else (0,) if i % 2 else (9,))
    ]
    outcomes = ps.launch(
        run_momentum, ([(case, strategy, knobs) for case, strategy, knobs, _ in runs], devices), devices, threads=1,
        timeout_seconds=60.0,
    )  # fmt: skip
    for (case, _, _, promise), outcome in zip(runs, outcomes, strict=True):
        assert_trains_the_same(outcome, reference(case, promise))


def test_all_strategies_log_the_momentum() -> None:
    case = MOMENTUM_CASES["momentum_schedule"]
    got, expected = ([step["momentum"] for step in case.run(s).steps] for s in ("fill", "reference"))
    assert got == expected == [0.5, 0.55, 0.6, 0.65]


# ---------------------------------------------------------------- what the plain loop itself computes


def plain(task: ps.Momentum, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The whole-batch loss's gradients, in a few lines without anything of ours."""
    outputs = [task.student(x) for x in inputs[: task.views]]
    with torch.no_grad():
        taught = [task.teacher(x) for x in inputs[: task.teacher_views or task.views]]
    sum(task.loss(outputs, taught, None).values()).backward()
    return {name: p.grad.clone() for name, p in task.student.named_parameters()}


def smooth_encoder() -> list[nn.Module]:
    """Without dropout and batch norm, so that microbatches and the whole batch mean the same."""
    return [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(24, WIDTH)]


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(
    ("strategy", "knobs", "promise", "batch_loss"),
    [*((*one, False) for one in EVERY_ONE), *((*one, True) for one, _ in SOME)],
    ids=name_of,
)
def test_every_gradient_counts(strategy: str, knobs: dict[str, Any], promise: tuple[int, int, int], batch_loss: bool) -> None:
    """One step of plain SGD with a rate of 1 changes the weights by the gradient of the whole batch, all views included.

    TSPipe's released code drops gradients of microbatches here.
    """
    torch.manual_seed(2)
    loss = {"loss": info_nce} if batch_loss else {}
    task = momentum_task(smooth_encoder, views=3, teacher_views=2, batch_loss=batch_loss, momentum=0.75, **loss)()
    task.student.double(), task.teacher.double()
    batch = tuple(x.double() for x in images_in_views(6, 4, 3, rows=(7,))()[0][0])
    before = {name: p.detach().clone() for name, p in task.student.named_parameters()}
    expected = plain(copy.deepcopy(task), batch)
    ps.Trainer(
        task, lr=1.0, devices=3, strategy=strategy, microbatches=MICROBATCHES, costs=unit_costs(task), device="cpu",
        **knobs,
    ).fit([(batch, None)])  # fmt: skip
    for name, p in task.student.named_parameters():
        assert torch.allclose(before[name] - p, expected[name], rtol=1e-9, atol=1e-12), name
        assert expected[name].abs().max() > 0
    for name, p in task.teacher.named_parameters():  # one move after the update
        assert torch.allclose(p, 0.75 * before[name] + 0.25 * task.student.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_the_teacher_follows_after_every_update() -> None:
    """m from the schedule, of the step, and the student's new weights: what the reference does, step by step."""
    moments = [0.5, 0.25, 0.0]
    task = momentum_task(smooth_encoder, momentum=lambda step: moments[step])()
    expected = {name: p.detach().clone() for name, p in task.teacher.named_parameters()}
    students: list[dict[str, Tensor]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            if self.param_groups[0]["params"][0] is next(task.student.parameters()):  # not a trial on copies
                students.append({name: p.detach().clone() for name, p in task.student.named_parameters()})

    ps.Trainer(task, optimizer=Watched, strategy="reference", device="cpu").fit(TWO(), steps=3)
    for m, student in zip(moments, students, strict=True):
        expected = {name: m * p + (1 - m) * student[name] for name, p in expected.items()}
    for name, p in task.teacher.named_parameters():
        assert torch.allclose(p, expected[name])
        assert torch.equal(p, task.student.get_parameter(name))  # the last m is 0


def test_clipping_is_that_of_torch() -> None:
    task = momentum_task(smooth_encoder)()
    batch = TWO()[0]
    other = copy.deepcopy(task)
    plain(other, batch[0])
    before = [p.detach().clone() for p in other.student.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(other.student.parameters(), 0.01)
    assert norm > 0.1
    ps.Trainer(task, lr=1.0, devices=2, microbatches=1, costs=unit_costs(task), clip_grad_norm=0.01, device="cpu").fit([batch])
    for old, p, theirs in zip(before, task.student.parameters(), other.student.parameters(), strict=True):
        assert torch.allclose(old - p, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("buffers", ["own", "copy"])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_teachers_buffers(mode: Any, buffers: Any, devices: int) -> None:
    task = momentum_task(teacher_mode=mode, teacher_buffers=buffers)()
    start = {name: b.clone() for name, b in task.teacher.named_buffers()}
    case = Case(lambda: task, TWO)
    case.run("fill", devices)
    for name, buffer in task.teacher.named_buffers():
        assert torch.equal(buffer, task.student.get_buffer(name)) == (
            buffers == "copy" or (mode == "train" and name.endswith("num_batches_tracked"))
        )
        assert torch.equal(buffer, start[name]) == (mode == "eval" and buffers == "own")


def test_buffers_that_forwards_replace_are_copied_too() -> None:
    task = MOMENTUM_CASES["new_buffers_copied"].task()
    Case(lambda: task, TWO).run("fill", 2)
    assert torch.equal(task.teacher[2].mean, task.student[2].mean)


@pytest.mark.usefixtures("quick_plans")
def test_costs_are_measured_for_all_views() -> None:
    """Larger views take longer, and the plan knows; nothing that is measured changes the result."""
    case = MOMENTUM_CASES["crops"]
    assert_trains_the_same(case.run("fill", 2, costs=None), reference("crops"))
    task = case.task()
    result = ps.Trainer(task, devices=2, microbatches=3, device="cpu").fit(images_in_views(24, 24, 3)())
    scales = result.plan.costs.views
    assert len(scales) == 3
    assert sum(scales) == pytest.approx(3.0)
    assert scales[2] < min(scales[:2])


def test_validation_takes_plain_inputs() -> None:
    case = MOMENTUM_CASES["byol"]
    validate = [(views[0], None) for views, _ in TWO()]
    metrics = {"sum": lambda output, target: output.double().sum(1).mean()}
    got, expected = (
        Case(case.task, case.loader, lambda: validate, {"epochs": 2}, case.trainer).run(s, d, metrics=metrics)
        for s, d in (("fill", 3), ("reference", 1))
    )
    assert len(got.validations) == 2
    assert_trains_the_same(got, expected)


# ---------------------------------------------------------------- what is refused


def blocks(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def shared(**rest: Any) -> ps.Momentum:
    student, act = blocks(4, 4), nn.Tanh()
    return ps.Momentum(nn.Sequential(*copy.deepcopy(student), act), nn.Sequential(*student, act), mse, **rest)


def mse(student: Any, teacher: Any, target: Any) -> Tensor:
    return sum((F.mse_loss(s, t) for s, t in zip(student, teacher, strict=False)), torch.zeros(()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ps.Momentum(blocks(4, 5), blocks(4, 4), mse),
            r"teacher block 0 \('0'\) has a parameter '0.weight' \(5, 4\), which student block 0 \('0'\) lacks; a momentum "
            "teacher is a copy of the student's first blocks",
        ),
        (
            lambda: ps.Momentum(blocks(4, 4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), mse),
            r"teacher block 1 \('1'\) has a parameter '1.weight' \(4, 4\), which student block 1 \('1'\) lacks",
        ),
        (
            lambda: ps.Momentum(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4, bias=False)), mse),
            r"teacher block 0 \('0'\) has a parameter '0.bias' \(4,\), which student block 0 \('0'\) lacks",
        ),
        (
            lambda: ps.Momentum(blocks(4, 4, 4, 4), blocks(4, 4, 4), mse),
            "the teacher has 3 blocks, more than the student's 2",
        ),
        (shared, r"teacher and student share '1'; a teacher needs .* of its own \(copy.deepcopy\)"),
        (lambda: ps.Momentum(*[blocks(4, 4)] * 2, mse), "teacher and student are the same module"),
        *(
            (lambda m=m: ps.Momentum(blocks(4, 4), blocks(4, 4), mse, momentum=m), rf"momentum is {m}; expected 0 or more")
            for m in (1.0, -0.1, 2, float("nan"))
        ),
        (
            lambda: ps.Momentum(blocks(4, 4), blocks(4, 4), mse, views=0),
            "views is 0; expected at least 1",
        ),
        (
            lambda: ps.Momentum(blocks(4, 4), blocks(4, 4), mse, teacher_views=3),
            "the teacher sees 3 of 2 views; expected 1 to all",
        ),
        (
            lambda: ps.Momentum(blocks(4, 4), blocks(4, 4), mse, teacher_mode="test"),
            "teacher_mode is 'test'; expected train or eval",
        ),
        (
            lambda: ps.Momentum(blocks(4, 4), blocks(4, 4), mse, teacher_buffers="none"),
            "teacher_buffers is 'none'; expected own or copy",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_task_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


X = torch.randn(6, 4)


def pair(**rest: Any) -> ps.Momentum:
    student = blocks(4, 4, 4, 4)
    return ps.Momentum(copy.deepcopy(student[:2]), student, mse, **rest)


def shapes_of_the_batch(student: Any, teacher: Any, target: Any) -> Tensor:
    return F.mse_loss(student[0], teacher[0]).sum()


class PerModel(nn.Module):
    """An output that has no row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(0)


@pytest.mark.parametrize(
    ("task", "options", "batch", "error", "message"),
    [
        (pair, {}, X, DataError, "the task has 2 views of each sample, so a batch's inputs are a tuple of 2, got Tensor"),
        (pair, {}, (X, X, X), DataError, "a tuple of 2, got 3 of them; let the loader yield"),
        (pair, {}, (X, X[:3]), UserError, "first axis must count the same samples"),
        (
            lambda: ps.Momentum(PerModel(), PerModel(), mse, batch_loss=True, student_cuts=[""], teacher_cuts=[""]),
            {},
            (X, X),
            ModelError,
            "a loss over the whole batch joins the outputs of microbatches by their first axis",
        ),
        pytest.param(
            pair,
            {"devices": 2, "student_partition": (2, 1)},
            (X, X),
            PlanError,
            r"student partition \[2, 1\]: the last stage holds the 1 blocks that the teacher lacks, and at least one block "
            "before them",
        ),
        (
            pair,
            {"devices": 2, "student_partition": (1, 2), "teacher_partition": (2, 0)},
            (X, X),
            PlanError,
            r"teacher partition \[2, 0\]",
        ),
        (
            pair,
            {"devices": 1, "student_partition": (3,), "teacher_partition": (1,)},
            (X, X),
            PlanError,
            "teacher partition .1. adds up to 1, but the teacher has 2 blocks",
        ),
        (pair, {"devices": 4}, (X, X), PlanError, "4 devices, but the teacher has . blocks"),
        (pair, {"costs": Costs.uniform(3, 1, 1, 1)}, (X, X), PlanError, "costs are of 3 student and 3 teacher blocks"),
        (pair, {"strategy": "1f1b", "staleness": 1}, (X, X), PlanError, "staleness is a knob of 'fill'"),
        (pair, {"strategy": "fill", "staleness": 2}, (X, X), PlanError, "staleness is 2; expected 0 or 1"),
        (pair, {"stash": "some"}, (X, X), PlanError, "stash is 'some'; expected a number of microbatches, or n, 2n-1 or all"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(
    task: Callable[[], Any], options: dict[str, Any], batch: Any, error: type[Exception], message: str
) -> None:
    of = task()
    before = [p.detach().clone() for p in of.student.parameters()]
    with pytest.raises(error, match=message) as caught:
        ps.Trainer(of, **{"costs": unit_costs(of), "microbatches": 2, "device": "cpu", **options}).fit([(batch, None)])
    assert isinstance(caught.value, UserError)
    assert all(torch.equal(a, b) for a, b in zip(before, of.student.parameters(), strict=True))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_to_is_positive(clip: float) -> None:
    with pytest.raises(UserError, match="clip_grad_norm is .*; expected (more than 0|a finite number)"):
        ps.Trainer(pair(), clip_grad_norm=clip)


@pytest.mark.parametrize("strategy", ["fill", "reference"])
def test_a_frozen_teacher_has_no_staleness(strategy: str) -> None:
    task = ps.Distillation(blocks(4, 4), blocks(4, 4), ps.losses.LogitsMSE())
    with pytest.raises(PlanError, match="staleness is of a momentum teacher; a frozen one has no versions; leave it out"):
        ps.Trainer(task, strategy=strategy, staleness=1, costs=unit_costs(task), device="cpu").fit([(X, None)])


@pytest.mark.parametrize("strategy", ["async"])
def test_a_frozen_teacher_is_never_stale(strategy: str) -> None:
    task = ps.Distillation(blocks(4, 4), blocks(4, 4), ps.losses.LogitsMSE())
    with pytest.raises(PlanError, match="momentum"):
        ps.Trainer(task, strategy=strategy, costs=unit_costs(task), device="cpu").fit([(X, None)])


def test_encoders_take_any_size() -> None:
    model = nn.Sequential(*encoder()).eval()
    assert {model(torch.randn(2, 3, s, s)).shape for s in (3, 4, 6)} == {(2, WIDTH)}
