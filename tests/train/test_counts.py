"""A batch's loss is one number: the same whatever microbatches and ranks it is taken in, however unevenly targets count."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fits import Case, Listener, assert_same, unit_costs
from support.pairwise import pairwise
from torch import Tensor, nn

import pipestill as ps

WORDS, LENGTH, ROWS = 11, 6, 7

Batch = tuple[Tensor, Tensor]


def words(seed: int, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, WORDS)).to(dtype)


def small(seed: int, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)).to(dtype)


def tokens(rows: int, num_labels: Callable[[int], int], seed: int = 0) -> Batch:
    """Sequences whose row i has a label at the first `num_labels(i)` places."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, WORDS, (rows, LENGTH), generator=generator) for _ in range(2))
    for row in range(rows):
        labels[row, num_labels(row) :] = -100
    return ids, labels


class Unsliced:
    """The loss and gradients of one batch in float64, taken at once, as its formula says."""

    def __init__(self, student: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        value = loss(student)  # type: ignore[arg-type]
        value.backward()
        self.loss = float(value.detach())
        self.gradients = {name: p.grad for name, p in student.named_parameters()}

    def error(self, got: Mapping[str, Tensor]) -> float:
        """The distance of gradients from these, as a fraction of their norm."""
        pairs = [(got[name].double(), wanted) for name, wanted in self.gradients.items() if wanted is not None]
        squares = sum(float((mine - wanted).square().sum()) for mine, wanted in pairs)
        return float((squares / sum(float(wanted.square().sum()) for _, wanted in pairs)) ** 0.5)


def soft_target(teacher: nn.Module, batch: Batch, student: nn.Module, temperature: float = 4.0, weight: float = 0.1) -> Tensor:
    """The mean over all labels of the batch."""
    ids, labels = batch
    mask = labels != -100
    mine, theirs = student(ids)[mask], teacher(ids)[mask].detach()
    p, q = (theirs / temperature).log_softmax(-1), (mine / temperature).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return weight * temperature**2 * divergence + F.cross_entropy(mine, labels[mask])


def first_update(
    task: Any, batch: Any, strategy: str = "reference", devices: int = 1, **trainer: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of one batch, from an update of SGD at rate 1, and the line of the log about it."""
    before = {name: p.detach().clone() for name, p in task.student.named_parameters()}
    listener = Listener()
    options = {"lr": 1.0, "log_every": 1, "costs": unit_costs(task), "device": "cpu", **trainer}
    ps.Trainer(task, strategy=strategy, devices=devices, callbacks=[listener], **options).fit([batch], steps=1)
    return {name: before[name] - p.detach() for name, p in task.student.named_parameters()}, listener.steps[0]


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_uneven_labels_give_the_same_update_whatever_microbatches(microbatches: int) -> None:
    """It was off by 18, 25 and 73 % at 2, 4 and 8 microbatches."""
    batch = tokens(8, lambda row: 1 + (5 * row) % 6)
    expected = Unsliced(
        small(0, dtype=torch.float64),
        partial(soft_target, small(1, dtype=torch.float64), batch),  # type: ignore[arg-type]
    )
    task = ps.Distillation(small(1), small(0), ps.losses.SoftTarget(4, 0.1))
    gradients, logged = first_update(task, batch, microbatches=microbatches)
    assert expected.error(gradients) < 1e-5
    assert logged["loss"] == pytest.approx(expected.loss, rel=1e-5)


LABELS: dict[str, Callable[[int], int]] = {
    "everywhere": lambda row: LENGTH,
    "uneven": lambda row: (5 * row) % (LENGTH + 1),
    "in one row": lambda row: 4 * (row == 3),
    "nowhere": lambda row: 0,
}
"""How many labels each row has: microbatches without any are among them."""


@cache
def unsliced(labels: str) -> Unsliced:
    student, teacher = words(0, dtype=torch.float64), words(1, dtype=torch.float64)
    return Unsliced(student, partial(soft_target, teacher, tokens(ROWS, LABELS[labels])))  # type: ignore[arg-type]


@cache
def plain(labels: str, microbatches: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    task = ps.Distillation(words(1), words(0), ps.losses.SoftTarget(4, 0.1))
    return first_update(task, tokens(ROWS, LABELS[labels]), microbatches=microbatches)


@pytest.mark.filterwarnings("ignore:nothing counts in batch")
@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(
    *pairwise(labels=LABELS, microbatches=(1, 3, 8), devices=(1, 2, 3, 4), strategy=("sequential", "gpipe", "1f1b", "fill"))
)
def test_a_batch_has_one_loss(labels: str, microbatches: int, devices: int, strategy: str) -> None:
    """That of the whole batch in float64; and every strategy equals the plain loop to the bit."""
    expected, logged = plain(labels, microbatches)
    if labels == "nowhere":
        assert logged["loss"] == logged["grad_norm"] == 0.0
        assert not any(tensor.any() for tensor in expected.values())
    else:
        assert logged["loss"] == pytest.approx(unsliced(labels).loss, rel=1e-5)
        assert unsliced(labels).error(expected) < 1e-5
    task = ps.Distillation(words(1), words(0), ps.losses.SoftTarget(4, 0.1))
    batch = tokens(ROWS, LABELS[labels])
    got, line = first_update(task, batch, strategy, devices, microbatches=microbatches, log_every=1)
    assert line == logged
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


def test_a_batch_without_labels_trains_on_and_is_told_once() -> None:
    batches = [tokens(5, LABELS[name]) for name in ("uneven", "nowhere", "nowhere", "uneven")]
    task = ps.Distillation(words(1), words(0), ps.losses.SoftTarget())
    listener = Listener()
    trainer = ps.Trainer(task, strategy="reference", microbatches=3, device="cpu", log_every=1, callbacks=[listener])
    with pytest.warns(UserWarning, match=r"nothing counts in batch 1 .*: soft_target, cross_entropy of the loss are") as warned:
        trainer.fit(batches)
    assert len([one for one in warned if "nothing counts" in str(one.message)]) == 1
    assert [step["loss"] > 0 for step in listener.steps] == [True, False, False, True]
    assert all(p.isfinite().all() for p in task.student.parameters())


@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_class_weights_through_counted(microbatches: int) -> None:
    """`F.cross_entropy(weight=...)` divides by the weights of a microbatch's labels; `counted` by those of the batch's."""
    weight = torch.linspace(0.1, 3.0, WORDS)
    ids, labels = tokens(10, LABELS["everywhere"])
    batch = ids, labels[:, 0]

    def first_word() -> nn.Sequential:
        return nn.Sequential(*words(0), nn.Flatten(), nn.Linear(WORDS * LENGTH, WORDS))

    def expected(student: nn.Module) -> Tensor:
        return F.cross_entropy(student(ids), labels[:, 0], weight.double())

    torch.manual_seed(0)
    student = first_word()
    loss = ps.losses.counted(nn.CrossEntropyLoss(weight, reduction="sum"), lambda target: weight[target].sum())
    torch.manual_seed(0)
    whole = Unsliced(first_word().double(), expected)  # type: ignore[arg-type]
    gradients, logged = first_update(ps.Supervised(student, loss), batch, microbatches=microbatches)
    assert whole.error(gradients) < 1e-5
    assert logged["loss"] == pytest.approx(whole.loss, rel=1e-5)


def relations(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    """RKD's distances between the samples of a batch (Park et al. 2019, equation 4)."""

    def distances(output: Tensor) -> Tensor:
        between = F.pdist(output)
        return between / between.mean()

    return F.smooth_l1_loss(distances(student), distances(teacher))


def vectors(rows: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(3))


def linears(seed: int, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8, 12])
def test_relations_between_samples_take_the_whole_batch(microbatches: int) -> None:
    """They were off by 35, 86, 95 and 100 % at 2, 4, 8 and 12 microbatches, and nothing was said."""
    x = vectors(24)
    teacher = linears(1, dtype=torch.float64)
    expected = Unsliced(
        linears(0, dtype=torch.float64),
        lambda student: relations(student(x.double()), teacher(x.double()).detach(), None),  # type: ignore[operator]
    )
    task = ps.Distillation(linears(1), linears(0), relations, batch_loss=True)
    gradients, logged = first_update(task, x, microbatches=microbatches)
    assert expected.error(gradients) < 1e-5
    assert logged["loss"] == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(*pairwise(microbatches=(1, 2, 8), devices=(1, 2, 3), strategy=("sequential", "gpipe", "1f1b", "fill")))
def test_a_batch_loss_of_a_distillation_is_exact(microbatches: int, devices: int, strategy: str) -> None:
    case = Case(lambda: ps.Distillation(linears(1), linears(0), relations, batch_loss=True), lambda: [vectors(24), vectors(7)])
    assert_same(case.run(strategy, devices, microbatches=microbatches), case.run("reference", microbatches=microbatches))


def test_a_supervised_loss_may_take_the_whole_batch_too() -> None:
    def spread(output: Tensor, target: Any) -> Tensor:
        return F.pdist(output).log().mean()

    case = Case(lambda: ps.Supervised(linears(0), spread, batch_loss=True), lambda: [vectors(9)], trainer={"costs": None})
    expected = case.run("reference", microbatches=1).steps[0]["loss"]
    assert case.run("reference", microbatches=4).steps[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert_same(case.run("gpipe", 2, microbatches=4), case.run("reference", microbatches=4))


def alike(students: list[Tensor], teachers: list[Tensor], labels: Tensor) -> Tensor:
    """A sum over the rows that have a label, over two views."""
    chosen = labels != -100
    return torch.stack([F.mse_loss(s[chosen], t[chosen], reduction="sum") for s, t in zip(students, teachers, strict=True)]).sum()


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("strategy", "devices"), [("fill", 2), ("tspipe", 2)])
def test_a_loss_of_a_momentum_teacher_may_count(strategy: str, devices: int) -> None:
    def task() -> ps.Momentum:
        loss = ps.losses.counted(alike, lambda labels: (labels != -100).sum())
        return ps.Momentum(linears(0), linears(0), loss, momentum=0.5)

    def batches() -> list[Any]:
        labels = torch.tensor([-100, 1, -100, -100, 2, 0, -100])
        return [((vectors(7) * i, vectors(7) + i), labels) for i in (1, 2, 3)]

    case, stale = Case(task, batches), {"staleness": int(strategy == "tspipe")}
    whole, cut = (case.run("reference", microbatches=count, **stale) for count in (1, 4))
    assert cut.steps[-1]["loss"] == pytest.approx(whole.steps[-1]["loss"], rel=1e-5)
    assert_same(case.run(strategy, devices, microbatches=4), cut)


def annealed(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    return F.mse_loss(student, teacher) * (1.0 + ps.step_number())


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("strategy", "devices"), [("gpipe", 2), ("fill", 3)])
def test_a_loss_is_told_the_step(strategy: str, devices: int) -> None:
    """Dry runs and costs that are measured do not count."""
    case = Case(lambda: ps.Distillation(linears(1), linears(0), annealed), lambda: [vectors(6)] * 4, trainer={"lr": 0.0})
    expected = case.run("reference")
    first = expected.steps[0]["loss"]
    assert [step["loss"] / first for step in expected.steps] == pytest.approx([1.0, 2.0, 3.0, 4.0])
    assert_same(case.run(strategy, devices, costs=None), expected)
