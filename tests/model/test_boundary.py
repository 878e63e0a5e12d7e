"""Where the graph of a model is divided."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import CASES, SGD, UNUSED, Call, distilled, supervised
from support.fits import Case, assert_exact, assert_same
from support.models import CLASSES, vectors
from support.pairwise import every_other
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipestill.model.boundary import SplitBlock, detached, start_graph, start_of, why_whole
from pipestill.model.dry_run import dry_run
from pipestill.model.nests import distinct_tensors


def test_a_new_graph_gives_gradients_as_they_come() -> None:
    """Leaves of autograd would store the first one contiguously: a sum over it would differ in its last bits."""
    x = torch.randn(5, 32, requires_grad=True)
    start = x * 1.0
    value, tracked, gradients = detached({"turned": start, "again": start, "unused": x * 2, "plain": torch.ones(3)})
    assert value["turned"] is value["again"]
    assert value["plain"].requires_grad is False
    (value["turned"].t().contiguous() * 2).sum().backward()
    assert [g if g is None else g.stride() for g in gradients] == [(1, 5), None]
    assert tracked[0] is start
    assert x.grad is None


def test_tensors_of_a_new_graph_may_be_written_to() -> None:
    tensors, gradients = start_graph([torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 1.0])])
    flat = torch.nn.Flatten(0)(tensors[0])
    (flat.relu_() * tensors[1].mul_(3.0)).sum().backward()
    assert torch.equal(torch.stack([g for g in gradients if g is not None]), torch.tensor([[0.0, 3.0], [0.0, 6.0]]))


def test_a_value_without_a_graph_stays_as_it_is() -> None:
    value = {"x": torch.ones(2), "y": [1]}
    fresh, tracked, gradients = detached(value)
    assert fresh["x"] is value["x"]
    assert tracked == gradients == []


class Product(torch.autograd.Function):
    """x @ w.t() by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class Once(Product):
    """Throws away in its backward what a second one would need."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        del ctx.once
        return g @ w, g.t() @ x

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.once = True
        ctx.save_for_backward(x, w)
        return x @ w.t()


def matrix(size: int = 8) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, size) / 3)


def of(function: type[Product]) -> Callable[[], nn.Module]:
    return lambda: Call(lambda self, x: torch.relu(function.apply(x, self.weight)), weight=matrix())


def twice() -> nn.Module:
    return Call(lambda self, x: self.layer(torch.tanh(self.layer(x))), layer=nn.Linear(8, 8))


def tied() -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return Call(lambda self, x: self.second(torch.tanh(self.first(x))), first=first, second=second)


def recomputed(reentrant: bool) -> Callable[[], nn.Module]:
    return lambda: Call(
        lambda self, x: checkpoint(self.inner, x, use_reentrant=reentrant),
        inner=nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 8)),
    )


def attention() -> nn.Module:
    return Call(
        lambda self, x: self.attention(x, x, x, need_weights=False)[0],
        attention=nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True),
    )


def with_another_output(make: Callable[[nn.Parameter], Any]) -> Callable[[], list[nn.Module]]:
    """A block with a second output, of its weights alone, and one that joins the two."""

    def blocks() -> list[nn.Module]:
        both = Call(lambda self, x: (self.a(x), make(self.b)), a=nn.Linear(8, 8), b=matrix())
        return [both, Call(lambda self, v: v[0] @ v[1])]

    return blocks


def spectral() -> nn.Module:
    """Each forward changes the weight a little."""
    return torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


def residual() -> nn.Module:
    return Call(lambda self, x: x + self.layer(F.gelu(self.norm(x))), norm=nn.LayerNorm(8), layer=nn.Linear(8, 8))


def mlp(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), *more, nn.Linear(16, 8))


ROWS, SEQUENCE, IMAGE = (4, 8), (4, 5, 8), (4, 3, 8, 8)

SPLIT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 8), ROWS),
    "linear without bias": (lambda: nn.Linear(8, 8, bias=False), SEQUENCE),
    "mlp": (lambda: mlp(nn.Dropout(0.3)), ROWS),
    "in place": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)), ROWS),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), IMAGE),
    "grouped conv": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3, groups=3, stride=2)), IMAGE),
    "batch norm": (lambda: nn.BatchNorm2d(3), IMAGE),
    "conv and batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2)),
        IMAGE,
    ),
    "layer norm": (lambda: nn.LayerNorm(8), SEQUENCE),
    "group norm": (lambda: nn.GroupNorm(3, 3), IMAGE),
    "residual": (residual, SEQUENCE),
    "attention": (attention, SEQUENCE),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), SEQUENCE),
    "transformer layer, norm first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True),
        SEQUENCE,
    ),
    "lstm": (lambda: nn.LSTM(8, 8, batch_first=True), SEQUENCE),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), ROWS),
    "scale and shift": (lambda: Call(lambda self, x: x * self.a + self.b, a=matrix(), b=matrix()), (5, 8, 8)),
    "custom function": (of(Product), ROWS),
    "checkpoint": (recomputed(False), ROWS),
    "nothing to train": (lambda: nn.Tanh(), ROWS),
    "parameter that goes unused": (lambda: Call(lambda self, x: self.a(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8)), ROWS),
}  # fmt: skip

WHOLE: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "one layer twice": (lambda: [twice()], "a weight is used more than once"),
    "tied weights": (lambda: [tied()], "a weight is used more than once"),
    "reentrant checkpoint": (lambda: [recomputed(True)()], "use_reentrant=True"),
    "function that runs once": (lambda: [of(Once)()], "AttributeError: 'OnceBackward' object has no attribute 'once'"),
    "output without the input": (with_another_output(torch.exp), "an output does not depend on the input"),
    "weight as output": (with_another_output(lambda b: b), "an output does not depend on the input"),
    "spectral norm": (lambda: [spectral()], "the two halves give other gradients than the whole"),
}
"""Each first block, and why its backward stays whole."""


def trained(block: nn.Module) -> list[nn.Parameter]:
    return [p for p in block.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", SPLIT)
def test_halves_are_the_whole(kind: str) -> None:
    """Bit by bit, with no gradient of a weight before the second half, and none of the input after the first."""
    make, shape = SPLIT[kind]
    torch.manual_seed(0)
    block = make()
    x = torch.randn(*shape, requires_grad=True) * 1.0
    assert why_whole(block, trained(block), x) is None
    assert all(p.grad is None for p in block.parameters())

    def forward() -> tuple[list[tuple[Tensor, Tensor]], Tensor | None, list[Tensor | None]]:
        torch.manual_seed(1)
        value, _, gradients = detached(x)
        outputs = [t for t in distinct_tensors(block(value)) if t.requires_grad]
        return [(t, torch.cos(t.detach())) for t in outputs], start_of([value]), gradients

    roots, _, expected_input = forward()
    torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])
    expected = [p.grad for p in block.parameters()]
    for p in block.parameters():
        p.grad = None
    roots, start, input_gradient = forward()
    halves = SplitBlock(start)
    halves.input_half(roots)
    assert torch.equal(input_gradient[0], expected_input[0])
    assert all(p.grad is None for p in block.parameters())
    del input_gradient[:]
    halves.weight_half()
    for (name, p), gradient in zip(block.named_parameters(), expected, strict=True):
        assert (p.grad is None) == (gradient is None), name
        assert gradient is None or torch.equal(p.grad, gradient), name
    assert not input_gradient
    assert not halves.branches and not halves.whole


def test_gradients_add_up_over_microbatches() -> None:
    """The second halves of two microbatches, both of whose first halves came before."""
    torch.manual_seed(0)
    block = mlp()
    rows = [torch.randn(4, 8, requires_grad=True) * 1.0 for _ in range(2)]
    for x in rows:
        block(detached(x)[0]).sin().sum().backward()
    expected = [p.grad for p in block.parameters()]
    block.zero_grad()
    halves = []
    for x in rows:
        value, _, _ = detached(x)
        out = block(value)
        halves.append(SplitBlock(start_of([value])))
        halves[-1].input_half([(out, torch.cos(out.detach()))])
    for half in halves:
        half.weight_half()
    assert all(torch.equal(p.grad, g) for p, g in zip(block.parameters(), expected, strict=True))


def test_a_block_whose_input_has_no_gradient_is_one_half() -> None:
    layer = nn.Embedding(7, 8)
    out = layer(torch.tensor([[1, 2], [2, 6]]))
    halves = SplitBlock(start_of([]))
    halves.input_half([(out, torch.ones_like(out))])
    assert layer.weight.grad is None
    halves.weight_half()
    assert layer.weight.grad.sum(1).tolist() == [0, 8, 16, 0, 0, 0, 8]


@pytest.mark.parametrize("kind", WHOLE)
def test_what_stays_whole_says_why(kind: str) -> None:
    make, reason = WHOLE[kind]
    block = make()[0]
    said = why_whole(block, trained(block), torch.randn(4, 8, requires_grad=True) * 1.0)
    assert said is not None
    assert reason in said
    assert all(p.grad is None for p in block.parameters())


X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


def test_the_dry_run_knows_which_blocks_stay_whole() -> None:
    task = supervised(nn.Linear(4, 8), twice(), nn.Tanh(), recomputed(False)(), tied(), nn.Linear(8, CLASSES))
    assert dict(dry_run(task, X, Y).unsplit) == {}  # nobody asked
    before = {name: t.clone() for name, t in task.student.state_dict().items()}
    unsplit = dry_run(task, X, Y, split=True).unsplit
    assert dict(unsplit) == {1: "a weight is used more than once", 4: "a weight is used more than once"}
    assert all(torch.equal(t, before[name]) for name, t in task.student.state_dict().items())
    assert all(p.grad is None for p in task.student.parameters())


def test_the_first_block_and_frozen_ones_are_never_asked() -> None:
    """The one's input has no gradient, so that it is one half anyway; the others have no gradients of weights."""
    task = supervised(
        Call(lambda self, x: self.layer(self.layer(x)), layer=nn.Linear(4, 4)), nn.Linear(4, 8),
        twice().requires_grad_(False), nn.Linear(8, CLASSES),
    )  # fmt: skip
    assert dict(dry_run(task, X, Y, split=True).unsplit) == {}


# ---------------------------------------------------------------- training


def exact(task: Callable[[], Any], loader: Callable[[], Any] = vectors, devices: tuple[int, ...] = (1, 2, 3)) -> None:
    case = Case(task, loader, trainer={**SGD, "lr": 0.1, "clip_grad_norm": 1.0})
    expected = case.run("reference")
    for count in devices:
        assert_same(case.run("fill", count, split_backward=True), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, in forwards that need none
@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize("kind", every_other(WHOLE))
def test_training_with_a_block_that_stays_whole(kind: str) -> None:
    make, _ = WHOLE[kind]
    exact(lambda: distilled(nn.Linear(4, 8), *make(), nn.Tanh(), mlp(), nn.Linear(8, CLASSES)))


def words() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(9, (n, 5), generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in (10, 10, 7)
    ]


@pytest.mark.usefixtures("quick_plans")
def test_training_words() -> None:
    """An embedding first, attention and an LSTM, whose output is a nest, behind it."""
    exact(
        lambda: supervised(
            nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.LSTM(8, 8, batch_first=True),
            Call(lambda self, v: v[0].mean(1)), recomputed(False)(), nn.Linear(8, CLASSES),
        ),
        words,
    )  # fmt: skip


NOT_OF_BLOCKS = (
    "random_loss", "wide_loss", "centered_loss", "random_teacher", "deep_teacher", "refilled", "stream", "one_batch", "one_row",
    "steps", "steps_within_epochs", "two_rates", "decays", "counted", "bfloat16",
)  # fmt: skip
"""Peculiar by their teacher, loss, batches, optimizer or number format: halves of a backward are as in the other cases."""


@pytest.mark.filterwarnings(UNUSED)
@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(
    "case",
    [
        *every_other(name for name in CASES if name not in NOT_OF_BLOCKS),
        *(pytest.param(name, marks=pytest.mark.slow) for name in NOT_OF_BLOCKS),
    ],
)
def test_peculiar_models(case: str) -> None:
    """Two blocks of a stage that share a weight among them ("tied"): its gradient is one sum, in one backward."""
    assert_exact(CASES[case], devices=[CASES[case].most_devices()], split_backward=True)
