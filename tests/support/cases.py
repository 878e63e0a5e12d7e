"""Tasks that a pipeline could get silently wrong, one peculiarity each. Built by name, so that processes can too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import pipestill as ps
from pipestill import Block
from support.feature_cases import FEATURES, tied_across_features
from support.fits import Case, Outcome, search_less
from support.models import CLASSES, AlwaysDropout, Pool, Stream, distillation, images, vectors

Make = Callable[[], nn.Module]


def supervised(*blocks: nn.Module) -> ps.Supervised:
    return ps.Supervised(nn.Sequential(*blocks), ps.losses.cross_entropy)


def distilled(*blocks: nn.Module, **cuts: Any) -> ps.Distillation:
    teacher = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    return ps.Distillation(teacher, nn.Sequential(*blocks), ps.losses.SoftTarget(), **cuts)


def linears(*sizes: int) -> list[nn.Module]:
    return [nn.Linear(a, b) for a, b in pairwise(sizes)]


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class Call(nn.Module):
    """A function as a block, with parameters for it."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, value: Any) -> Any:
        return self.function(self, value)


# ---------------------------------------------------------------- what crosses a boundary


def dictionaries() -> ps.Distillation:
    """Values of every kind: names, numbers, a mask, a number that follows from the rows, a scalar, nested tuples."""

    def start(self: Any, x: Tensor) -> dict[str, Any]:
        h = self.layer(x)
        return {"h": h, "mask": x[:, :1] > 0, "more": (3, "gelu", None, [0.5, True]), "rows": 2 * len(x) + 1, "aux": h.mean()}

    def middle(self: Any, v: dict[str, Any]) -> dict[str, Any]:
        assert v["rows"] == 2 * len(v["h"]) + 1 and v["more"] == (3, "gelu", None, [0.5, True])
        h = self.layer(F.gelu(v["h"]) * v["mask"] * v["more"][0])
        return {**v, "h": h, "aux": v["aux"] + h.square().mean() / v["rows"]}

    def end(self: Any, v: dict[str, Any]) -> Tensor:
        return self.layer(v["h"]) + v["aux"]

    return distilled(
        Call(start, layer=nn.Linear(4, 8)),
        Call(middle, layer=nn.Linear(8, 8)),
        Call(middle, layer=nn.Linear(8, 8)),
        Call(end, layer=nn.Linear(8, CLASSES)),
    )


def aliases() -> ps.Distillation:
    """The same tensor twice in one value: two uses, one gradient."""
    twice = Call(lambda self, x: (x, {"again": x}))
    both = Call(lambda self, v: self.a(v[0]) + self.b(v[1]["again"]), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    return distilled(nn.Linear(4, 8), twice, both, nn.Tanh(), nn.Linear(8, CLASSES))


def skips() -> ps.Distillation:
    """A tensor that passes through two stages untouched, used early and late: its gradient adds up over stages."""
    return distilled(
        Call(lambda self, x: (self.layer(x), x), layer=nn.Linear(4, 8)),
        Call(lambda self, v: (self.layer(v[0]) * v[0], v[0], v[1]), layer=nn.Linear(8, 8)),
        Call(lambda self, v: (torch.tanh(v[0]) + v[1] * v[1].exp(), v[1], v[2])),
        Call(lambda self, v: self.layer(v[0] * v[1] + v[1].sin()) + v[2].sum(1, keepdim=True), layer=nn.Linear(8, CLASSES)),
    )


def views() -> ps.Supervised:
    """Outputs that share memory, with gaps between their rows, and sums over these."""

    def norm(self: Any, v: Any) -> list[Tensor]:
        return [h - h.mean(0) for h in v]

    return supervised(
        Call(lambda self, x: self.layer(x).chunk(8, -1), layer=nn.Linear(4, 8)),
        Call(norm),
        Call(lambda self, v: self.layer(torch.cat(v, 1)), layer=nn.Linear(8, 24)),
        Call(lambda self, h: [h[:, ::3], h[:, 1::3], h[:, 2:3]]),
        Call(norm),
        Call(lambda self, v: self.layer(v[0] * v[1] + v[2]), layer=nn.Linear(8, CLASSES)),
    )


def turned() -> ps.Supervised:
    """Values and gradients whose rows are not the slowest axis in memory."""

    def turn(self: Any, x: Tensor) -> Tensor:
        return (self.weight @ (x.t().contiguous() * self.weight[0, 0])).t()

    def matrix() -> nn.Parameter:
        return nn.Parameter(torch.randn(32, 32) / 5)

    return supervised(
        nn.Linear(4, 32), Call(turn, weight=matrix()), nn.Linear(32, 32), Call(turn, weight=matrix()), nn.Linear(32, CLASSES)
    )


def repeated() -> ps.Supervised:
    """Values that repeat one number, along features and along rows, and gradients that do."""
    return supervised(
        nn.Linear(4, 8),
        Call(lambda self, x: self.scale.expand(len(x), -1) * 1.0 + x.mean(0), scale=nn.Parameter(torch.rand(8))),
        Call(lambda self, x: (x, self.shift.expand(len(x), -1)), shift=nn.Parameter(torch.rand(8))),
        Call(lambda self, v: v[0] + v[1] - v[1].mean(0)),
        nn.Linear(8, 8),
        Call(lambda self, x: x.sum(1, keepdim=True).expand(-1, CLASSES)),
        Call(lambda self, x: x * self.out, out=nn.Parameter(torch.rand(CLASSES))),
    )


def channels_last() -> ps.Distillation:
    student = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1),
        Pool(),
        nn.Linear(8, CLASSES),
    ).to(memory_format=torch.channels_last)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, CLASSES))
    return ps.Distillation(teacher.to(memory_format=torch.channels_last), student, ps.losses.SoftTarget())


def channels_last_images() -> list[tuple[Tensor, Tensor]]:
    return [(x.to(memory_format=torch.channels_last), y) for x, y in images()]


def scalars() -> ps.Supervised:
    """Tensors without an axis, a parameter and a buffer that cross as they are."""

    class Start(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.rand(8)), nn.Linear(4, 8)
            self.register_buffer("table", torch.rand(8))
            self.gain = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Any:
            return self.layer(x), self.token, self.table, self.gain, self.gain.detach() * 2

    add = Call(lambda self, v: (v[0] * v[3] + v[1] * v[2], *v[1:]))
    end = Call(lambda self, v: self.layer(v[0] * v[4]) * v[3], layer=nn.Linear(8, CLASSES))
    return supervised(Start(), add, end)


def many() -> ps.Supervised:
    """More tensors at once than a message has tags for."""
    grow = Call(lambda self, x: [self.layer(x) * i for i in range(1, 22)], layer=nn.Linear(4, 8))
    return supervised(
        grow, Call(lambda self, v: [*v[1:], v[0].tanh()]), Call(lambda self, v: self.layer(sum(v)), layer=nn.Linear(8, CLASSES))
    )


def odd_types() -> ps.Supervised:
    """Types beside float32, and a tensor without any number in it."""

    def start(self: Any, x: Tensor) -> Any:
        h = self.layer(x)
        return (
            h,
            h.double(),
            h.bfloat16(),
            x > 0,
            (x * 9).to(torch.int8),
            x.argmax(1),
            h.new_zeros(len(x), 0),
            torch.view_as_complex(h.view(-1, 4, 2)),
        )

    def end(self: Any, v: Any) -> Tensor:
        h = v[0] + v[1].sin().float() + v[2].tanh().float() + torch.view_as_real(v[7] * 1j).reshape(-1, 8)
        return self.layer(h) * v[3].sum(1, keepdim=True) + v[4].float().mean(1, keepdim=True) + F.one_hot(v[5], CLASSES)

    return supervised(Call(start, layer=nn.Linear(4, 8)), Call(lambda self, v: tuple(v)), Call(end, layer=nn.Linear(8, CLASSES)))


# ---------------------------------------------------------------- writing in place


def in_place_starts() -> ps.Distillation:
    """Stages that begin by writing to their input, behind a block that only passes it on, and on a view of it."""
    return distilled(
        nn.Linear(4, 8), nn.Identity(), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Unflatten(1, (2, 4)),
        nn.Flatten(), nn.ELU(inplace=True), nn.Linear(8, 8), nn.Dropout(0.2, inplace=True), nn.Linear(8, CLASSES),
    )  # fmt: skip


def in_place_without_gradient() -> ps.Distillation:
    """A mask and frozen features are written to in another stage than the one that made them."""

    def narrow(self: Any, v: Any) -> Any:
        v["mask"][:, 0] = False
        v["h"].mul_(2.0)
        return v

    return distilled(
        Call(lambda self, x: {"h": self.layer(x), "mask": x > 0, "x": x}, layer=frozen(nn.Linear(4, 8))),
        Call(narrow),
        Call(lambda self, v: {**v, "h": self.layer(v["h"])}, layer=nn.Linear(8, 8)),
        Call(lambda self, v: self.layer(v["h"] * v["mask"].sum(1, keepdim=True) + v["x"].sum()), layer=nn.Linear(8, CLASSES)),
    )


def writes_to_the_batch() -> ps.Supervised:
    """A student alone may write to its batch; the loader's own tensors stay as they are."""
    return supervised(Call(lambda self, x: x.sub_(x.mean(0))), nn.Hardtanh(inplace=True), *linears(4, 8, CLASSES))


# ---------------------------------------------------------------- parameters, buffers, modes


def frozen_first() -> ps.Distillation:
    """Whole stages without anything to train, batch norm among them; its statistics still move."""
    return distilled(
        frozen(nn.Linear(4, 8)), frozen(nn.BatchNorm1d(8)), nn.Tanh(), frozen(nn.Linear(8, 8)),
        nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def frozen_between() -> ps.Distillation:
    return distilled(nn.Linear(4, 8), frozen(nn.Linear(8, 8)), nn.Tanh(), frozen(nn.Linear(8, 8)), nn.Linear(8, CLASSES))


def frozen_last() -> ps.Distillation:
    return distilled(*linears(4, 8, 8), nn.Tanh(), frozen(nn.Linear(8, CLASSES)))


def nothing_to_train_in_a_stage() -> ps.Distillation:
    return distilled(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, CLASSES))


def tied() -> ps.Distillation:
    """Two layers with one weight, both in the first stage."""
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return distilled(nn.Linear(4, 8), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(8, CLASSES))


def one_module_twice() -> ps.Distillation:
    """The same activation and the same dropout at several places, in stages of different ranks."""
    drop, act = nn.Dropout(0.3), nn.Tanh()
    return distilled(nn.Linear(4, 8), act, drop, nn.Linear(8, 8), act, drop, nn.Linear(8, CLASSES))


def sometimes_unused() -> ps.Supervised:
    """A parameter that some batches do not use: no gradient, so no decay and no momentum either."""

    def maybe(self: Any, x: Tensor) -> Tensor:
        return x * self.scale if float(x[0, 0].detach()) > 0 else x + 0.0

    return supervised(nn.Linear(4, 8), Call(maybe, scale=nn.Parameter(torch.ones(8))), nn.Linear(8, CLASSES))


UNUSED = r"ignore:the student's '(1\.scale|2\.inside\.0\.weight)'.* got no gradient on the sample batch:UserWarning"
"""The warnings of `sometimes_unused` and `only_features`, for `pytest.mark.filterwarnings`."""


class Average(nn.Module):
    """Puts a new tensor in the place of its buffer at every step, and has one that is first None."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.count = torch.zeros(()) if self.count is None else self.count + 1
        return x - self.mean


def new_buffers() -> ps.Distillation:
    return distilled(nn.Linear(4, 8), Average(), nn.Tanh(), nn.Linear(8, 8), Average(), nn.Linear(8, CLASSES))


class Counter(nn.Module):
    """Hands on a buffer that its next forward writes to, while the last one's message may still be on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.register_buffer("seen", torch.zeros(250_000))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.add_(1.0)
        return self.layer(x), self.seen, self.seen[::2].detach()


def crossing_buffer() -> ps.Supervised:
    end = Call(lambda self, v: self.layer(v[0] * v[1].mean() + v[2].mean()), layer=nn.Linear(8, CLASSES))
    return supervised(Counter(), end, nn.Identity())


class RootMode(nn.Module):
    """Reads the mode of the whole model inside its blocks; keeps its batch norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)])
        self.norm = nn.BatchNorm1d(8)

    def train(self, mode: bool = True) -> RootMode:
        super().train(mode)
        self.norm.eval()
        return self

    def first(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.layers[0](x)), 0.3, self.training)

    def second(self, x: Tensor) -> Tensor:
        return F.dropout(self.layers[1](x), 0.3, self.training)

    def pipeline_blocks(self) -> list[str | Block]:
        return [Block("first", self.first, ("layers.0", "norm")), Block("second", self.second, ("layers.1",)), "layers.2"]


def root_mode() -> ps.Supervised:
    return ps.Supervised(RootMode().eval(), ps.losses.cross_entropy)


def left_over() -> ps.Distillation:
    """Models as a user may have left them: in the other mode, with gradients of something else."""
    task = distilled(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
    task.student(torch.rand(3, 4)).sum().backward()
    task.student.eval()
    task.teacher.train()
    return task


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def recomputed() -> ps.Distillation:
    return distilled(nn.Linear(4, 8), Recomputed(), Recomputed(), nn.Linear(8, CLASSES))


def types(dtype: torch.dtype) -> Callable[[], ps.Distillation]:
    def make() -> ps.Distillation:
        task = distilled(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.1), nn.Linear(8, CLASSES))
        task.student.to(dtype)
        task.teacher.to(dtype)
        return task

    return make


def typed_vectors(dtype: torch.dtype) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    return lambda: [(x.to(dtype), y) for x, y in vectors()]


# ---------------------------------------------------------------- teacher, loss, data


def random_teacher() -> ps.Distillation:
    teacher = nn.Sequential(nn.Linear(4, 8), AlwaysDropout(), nn.Linear(8, 8), AlwaysDropout(), nn.Linear(8, CLASSES))
    return ps.Distillation(teacher, nn.Sequential(*linears(4, 8, 8, CLASSES)), ps.losses.SoftTarget())


def random_loss() -> ps.Distillation:
    """A loss that draws random numbers, and so must not see what was drawn elsewhere."""

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        noise = torch.randn_like(student)
        return {"close": F.mse_loss(student + noise, teacher), "labels": F.cross_entropy(F.dropout(student), target)}

    task = distilled(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES))
    return ps.Distillation(task.teacher, task.student, loss)


class Centered(nn.Module):
    """A loss with a running mean of the teacher's outputs, as DINO's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(CLASSES))

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        parts = {"centered": F.mse_loss(student, teacher - self.center), "labels": F.cross_entropy(student, target)}
        self.center.mul_(0.9).add_(teacher.mean(0), alpha=0.1)
        return parts


def centered_loss() -> ps.Distillation:
    task = distilled(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return ps.Distillation(task.teacher, task.student, Centered())


def wide_loss() -> ps.Distillation:
    """Outputs that are nests, a teacher's among them; a loss over hidden states whose gradient is one number repeated."""

    def keep(self: Any, v: Any) -> Any:
        v = v if isinstance(v, dict) else {"hidden": [], "x": v}
        h = self.layer(v["x"]).tanh()
        return {"hidden": [*v["hidden"], h], "x": h}

    def loss(student: Any, teacher: Any, target: Tensor) -> dict[str, Tensor]:
        hidden = sum((a - b).abs().mean() for a, b in zip(student["hidden"], teacher["hidden"], strict=True))
        return {"hidden": hidden, "logits": -student["x"].mean(), "labels": F.cross_entropy(student["x"], target)}

    def model() -> nn.Sequential:
        return nn.Sequential(*(Call(keep, layer=layer) for layer in linears(4, 8, 8, CLASSES)))

    return ps.Distillation(model(), model(), loss)


def deep_teacher() -> ps.Distillation:
    """A teacher whose output is its input's own memory, and a loss that writes to what it gets."""

    def loss(student: Tensor, teacher: Tensor, target: None) -> Tensor:
        return (student - teacher.mul_(0.5)).square().mean()

    teacher = nn.Sequential(nn.Identity(), nn.Flatten(), Call(lambda self, x: x + 0), nn.ReLU(inplace=True))
    return ps.Distillation(teacher, nn.Sequential(*linears(4, 8, 8, 4)), loss)


def without_targets() -> list[Tensor]:
    return [x for x, _ in vectors()]


def nested() -> ps.Supervised:
    """Inputs and targets that are nests, with something in them that is no tensor."""
    start = Call(lambda self, v: self.layer(v["a"] + v["b"][0]), layer=nn.Linear(4, 8))
    student = nn.Sequential(start, nn.Tanh(), nn.Linear(8, CLASSES))

    def loss(output: Tensor, target: Any) -> Tensor:
        assert target["kind"] == "soft"
        return F.cross_entropy(output, target["of"][0]) + F.mse_loss(output, target["of"][1])

    return ps.Supervised(student, loss)


def nested_data() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [
        ({"a": x, "b": [x.flip(0), "ignored"]}, {"kind": "soft", "of": (y, torch.rand(len(x), CLASSES, generator=generator))})
        for x, y in vectors()
    ]


class Refilled:
    """A loader that fills the same two tensors for every batch of a size."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.empty(10, 4), torch.empty(10, dtype=torch.int64)
        for inputs, targets in vectors((10, 10, 10, 10)):
            x.numpy()[:] = inputs.numpy()  # behind the back of torch's version counters
            y.numpy()[:] = targets.numpy()
            yield x, y

    def __len__(self) -> int:
        return 4


def two_rates(parameters: dict[str, nn.Parameter]) -> Sequence[dict[str, Any]]:
    weights = [p for p in parameters.values() if p.dim() > 1]
    return [{"params": weights, "lr": 0.2}, {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0}]


SGD = {"optimizer": torch.optim.SGD, "optimizer_options": {"momentum": 0.9, "weight_decay": 1e-2}}
ACCURACY = {"metrics": {"accuracy": ps.losses.accuracy, "mean": lambda output, target: output.double().mean()}}


LAYOUT = {**SGD, "lr": 0.1, "microbatches": 2}
"""Microbatches of so many rows that the order of a sum tells."""


def case(task: Callable[[], Any], loader: Callable[[], Any] = vectors, **rest: Any) -> Case:
    return Case(task, loader, **{"trainer": {**SGD, "lr": 0.1}, "fit": {"epochs": 2}, **rest})


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": torch.optim.SGD, "optimizer_options": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}},
    "adamw": {"optimizer": torch.optim.AdamW, "optimizer_options": {"weight_decay": 1e-2}},
}


# ---------------------------------------------------------------- batches of several lengths


def lengths(head_last: bool = False) -> ps.Distillation:
    """Token sequences: an attention mask (length x length), transposed and flattened boundaries, a number that follows from
    the length, and a loss of every token.
    """

    def start(self: Any, given: dict[str, Tensor]) -> dict[str, Any]:
        h = self.table(given["tokens"])
        allowed = given["mask"][:, None, None, :] & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        return {"h": h.transpose(1, 2), "allowed": allowed, "length": h.shape[1], "flat": h.reshape(-1, 6)}

    def attend(self: Any, v: dict[str, Any]) -> dict[str, Any]:
        assert v["length"] == v["h"].shape[2]
        h = v["h"].transpose(1, 2) + v["flat"].view(-1, v["length"], 6)
        seen = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], v["allowed"])[:, 0]
        h = h + F.dropout(self.layer(seen), 0.1, self.training)
        return {**v, "h": h.transpose(1, 2), "flat": self.layer(h.reshape(-1, 6))}

    def end(self: Any, v: dict[str, Any]) -> Tensor:
        hidden, scale = v["h"].transpose(1, 2), v["length"] / 8
        return self.layer(hidden * scale) if head_last else self.layer(hidden) * scale

    def blocks(count: int) -> list[nn.Module]:
        attends = [Call(attend, layer=nn.Linear(6, 6)) for _ in range(count)]
        return [Call(start, table=nn.Embedding(9, 6)), *attends, Call(end, layer=nn.Linear(6, 9))]

    return ps.Distillation(nn.Sequential(*blocks(1)), nn.Sequential(*blocks(2)), ps.losses.SoftTarget())


def sequences(sizes: Sequence[tuple[int, int]] = ((7, 6), (7, 9), (5, 4), (7, 11), (2, 1))) -> list[tuple[Any, Tensor]]:
    """Batches of (rows, length)."""
    generator, found = torch.Generator().manual_seed(3), []
    for rows, length in sizes:
        tokens, targets = (torch.randint(0, 9, (rows, length), generator=generator) for _ in range(2))
        mask = torch.rand(rows, length, generator=generator) < 0.9
        mask[:, 0] = True
        found.append(({"tokens": tokens, "mask": mask}, targets))
    return found


def counted() -> ps.Distillation:
    """Labels of which rows have 0 to all, so that a batch's loss is a sum over what its header counts."""
    task = lengths()
    return ps.Distillation(task.teacher, task.student, ps.losses.SoftTarget(4.0, 0.7))


def counted_sequences() -> list[tuple[Any, Tensor]]:
    """Microbatches without a label are among them."""
    batches = sequences(((7, 6), (5, 6), (2, 6)))
    for _, labels in batches:
        for row in range(len(labels)):
            labels[row, (5 * row) % 7 :] = -100
    return batches


def features_of_tokens() -> ps.Distillation:
    """Hidden states of the tokens that have a label."""
    task = lengths()
    pairs = {"0": "0", "1": "1"}
    term = ps.features(pairs, ps.losses.Hint(), project=True, of=lambda value: value["h"].transpose(1, 2))
    return ps.Distillation(task.teacher, task.student, ps.losses.SoftTarget(), features={"hidden": term})


def fused() -> ps.Distillation:
    """The loss applies both heads, and the student's gets its gradients there."""
    task = lengths(head_last=True)
    return ps.Distillation(task.teacher, task.student, ps.losses.JSD(0.3, 2.0, kd_ratio=0.6, chunk_size=2), fuse_heads=True)


CASES: dict[str, Case] = {
    **{
        make.__name__: case(make)
        for make in (
            dictionaries, aliases, skips, scalars, many, odd_types, in_place_starts,
            in_place_without_gradient, writes_to_the_batch, frozen_first, frozen_between, frozen_last,
            nothing_to_train_in_a_stage, sometimes_unused, new_buffers, crossing_buffer, left_over, recomputed, random_teacher,
            random_loss, wide_loss, centered_loss,
        )
    },
    **{make.__name__: case(make, lambda: vectors((33, 33, 20)), trainer=LAYOUT) for make in (views, turned, repeated)},
    "tied": case(tied, trainer={**SGD, "student_partition": (4, 1, 1)}),
    "channels_last": case(channels_last, channels_last_images),
    "one_module_twice": case(one_module_twice, validate=vectors, trainer={**SGD, **ACCURACY}),
    "root_mode": case(root_mode, validate=vectors, trainer={**SGD, **ACCURACY}),
    "float64": case(types(torch.float64), typed_vectors(torch.float64)),
    "bfloat16": case(types(torch.bfloat16), typed_vectors(torch.bfloat16)),
    "deep_teacher": case(deep_teacher, without_targets),
    "nested": case(nested, nested_data),
    "refilled": case(nothing_to_train_in_a_stage, Refilled),
    "stream": case(nothing_to_train_in_a_stage, lambda: DataLoader(Stream(), batch_size=None), validate=vectors),
    "one_batch": case(
        nothing_to_train_in_a_stage, lambda: vectors((7,)), fit={"epochs": 3}, trainer={**SGD, **ACCURACY},
        validate=lambda: vectors((4,)),
    ),
    "one_row": case(nothing_to_train_in_a_stage, lambda: vectors((1,)), fit={"epochs": 1}),
    "steps": case(nothing_to_train_in_a_stage, fit={"steps": 7}, validate=vectors, trainer={**SGD, **ACCURACY}),
    "steps_within_epochs": case(nothing_to_train_in_a_stage, fit={"steps": 5, "epochs": 4}, validate=vectors),
    "two_rates": case(nothing_to_train_in_a_stage, trainer={**SGD, "param_groups": two_rates, "lr_schedule": lambda k: 0.5**k}),
    "decays": case(nothing_to_train_in_a_stage, trainer={**OPTIMIZERS["adamw"], "weight_decay_schedule": lambda k: 3.0 * k}),
    "counted": case(
        counted, counted_sequences, validate=counted_sequences,
        trainer={**SGD, "metrics": {"accuracy": ps.losses.accuracy, "perplexity": ps.losses.perplexity}},
    ),
    "fused": case(fused, counted_sequences, validate=counted_sequences, trainer={**SGD, **ACCURACY}),
    **{make.__name__: case(make, vectors, trainer={**OPTIMIZERS["adamw"], "clip_grad_norm": 0.5}) for make in FEATURES},
    "tied_across_features": case(tied_across_features, trainer={**SGD, "student_partition": (3, 1)}),
    "features_of_tokens": case(features_of_tokens, counted_sequences),
    "lengths": case(
        lengths, sequences, validate=lambda: sequences(((5, 12), (3, 2))), fit={"epochs": 2},
        trainer={**SGD, **ACCURACY, "length_axis": 1},
    ),
}  # fmt: skip


EVERYTHING = Case(
    distillation,
    images,
    validate=lambda: images((7, 5), seed=6),
    fit={"epochs": 2},
    trainer={"lr_schedule": lambda step: 1.0 / (1 + step), **ACCURACY},
)
"""Dropout, batch norm, in-place ReLUs, an uneven and a tiny last batch, two epochs, validation, a schedule of lr."""


def run(runs: Sequence[tuple[str, str, dict[str, Any]]], devices: int, over: str) -> list[Outcome]:
    """Train cases one after the other, through "memory" or over "gloo": (case, strategy, options of the trainer) each.

    A target for `launch`.
    """
    os.environ["PIPESTILL_SHARED_MEMORY"] = str(int(over == "memory"))
    search_less()
    outcomes = []
    for name, strategy, trainer in runs:
        case = EVERYTHING if name == "everything" else CASES[name]
        outcome = case.run(strategy, devices, **trainer)
        outcome.student = None  # its blocks may hold functions, which do not pickle
        outcomes.append(outcome)
    return outcomes
