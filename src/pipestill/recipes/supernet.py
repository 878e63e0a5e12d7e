"""MobileNetV2 and a supernet of such networks, in stages that are trained blockwise; networks out of one path of the supernet."""

import copy
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pipestill.model.blockwise.task import batch_number
from pipestill.model.seeding import derive
from pipestill.recipes.architecture_search import SearchSteps

SKIP = "skip"

Paths = tuple[tuple[str, ...], ...]
"""The operation of every cell, stage by stage: "k5e3" is a 5x5 convolution between 3 times as many channels."""


@dataclass(frozen=True)
class MobileShape:
    """A network of inverted bottlenecks (MBConv) in stages: `widths`, `cells` and `strides` are theirs.

    `stem`: channels of the first convolution and of the bottleneck without expansion behind it; `head`: of the last
    convolution, before the classifier. `stem_stride`: of the first convolution. MobileNetV2 is
    MobileShape((24, 32, 64, 96, 160, 320), (2, 3, 4, 3, 3, 1), (2, 2, 2, 1, 2, 1)) (Sandler et al. 2018, table 2).
    """

    widths: tuple[int, ...]
    cells: tuple[int, ...]
    strides: tuple[int, ...]
    stem: tuple[int, int] = (32, 16)
    head: int = 1280
    stem_stride: int = 2

    def places(self, stage: int) -> list[tuple[int, int, int]]:
        """List the channels that each cell of a stage gets and gives, and its stride."""
        before, width = (self.stem[1], *self.widths)[stage], self.widths[stage]
        rest = [(width, width, 1)] * (self.cells[stage] - 1)
        return [(before, width, self.strides[stage]), *rest]


class MBConv(nn.Module):
    """A 1x1 convolution to `expansion` times the channels, one of each channel alone, and a 1x1 convolution back.

    There is a shortcut where the shape stays: (rows, in, h, w) -> (rows, out, ceil(h / stride), ceil(w / stride)).
    """

    def __init__(self, channels: int, width: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        inside = channels * expansion
        expand = [*_convolution(channels, inside, 1, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_convolution(inside, inside, kernel, stride, groups=inside), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *_convolution(inside, width, 1, 1))
        self.shortcut = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        after: Tensor = self.layers(x)
        return x + after if self.shortcut else after


def mbconv_flops(channels: int, width: int, stride: int, kernel: int, expansion: int, size: int) -> int:
    """FLOPs of an `MBConv` for one image of `size` x `size` pixels: two for each product and sum of its convolutions."""
    inside, after = channels * expansion, -(-size // stride)
    expand = size**2 * channels * inside if expansion > 1 else 0
    return 2 * (expand + after**2 * inside * kernel**2 + after**2 * inside * width)


class Cell(nn.Module):
    """Operations that may stand in one place of the network, and `alpha`, whose softmax says how likely each is."""

    def __init__(self, place: tuple[int, int, int], size: int, kernels: Sequence[int], expansions: Sequence[int]) -> None:
        super().__init__()
        channels, width, stride = place
        choices = [(kernel, expansion) for kernel in kernels for expansion in expansions]
        self.paths = nn.ModuleDict({f"k{k}e{e}": MBConv(*place, k, e) for k, e in choices})
        flops = [mbconv_flops(*place, k, e, size) for k, e in choices]
        if stride == 1 and channels == width:
            self.paths[SKIP] = nn.Identity()
            flops.append(0)
        self.alpha = nn.Parameter(torch.zeros(len(self.paths)))
        self.flops: tuple[int, ...] = tuple(flops)

    def operation(self, path: int) -> nn.Module:
        """Give one of the cell's operations."""
        return list(self.paths.values())[path]

    def best(self) -> int:
        """Find the most likely path; of several alike the first."""
        return int(self.alpha.detach().argmax())

    def sampled(self, count: int, *seed: object) -> list[int]:
        """Draw `count` different paths, one after the other, by the softmax of alpha. The same seed gives the same ones."""
        chances = self.alpha.detach().double().softmax(0).tolist()
        drawn: list[int] = []
        for number in range(count):
            free = [path for path in range(len(chances)) if path not in drawn]
            sums = list(accumulate(chances[path] for path in free))
            point = derive(*seed, number) / 2**63 * sums[-1]
            drawn.append(free[min(bisect_right(sums, point), len(free) - 1)])
        return drawn

    def expected_flops(self) -> Tensor:
        """Compute the mean FLOPs of the paths by their chances, as a fraction of the most expensive path's."""
        shares = torch.tensor(self.flops, dtype=self.alpha.dtype, device=self.alpha.device) / max(self.flops)
        return self.alpha.softmax(0) @ shares

    def gated(self, x: Tensor, *seed: object) -> Tensor:
        """Run one of two sampled paths, through gates that let the gradient reach alpha.

        Of two paths a, b drawn by softmax(alpha), with chances p over these two alone, one is active: its gate g is 1, the
        other's 0. The gradient of alpha_i is sum_j dL/dg_j p_j (delta_ij - p_i), over the two, and dL/dg_j the product of
        dL/dy with what path j gives (Cai et al., ProxylessNAS, ICLR 2019, section 3.2.1 and equation 4). Weights get no
        gradient, and running statistics stay.
        """
        two = self.sampled(2, *seed)
        chances = self.alpha[two].softmax(0)
        active = int(derive(*seed, "active") / 2**63 >= float(chances.detach()[0]))
        output = untrained(self.operation(two[active]), x)
        with torch.no_grad():
            other = untrained(self.operation(two[1 - active]), x)
        gates = chances - chances.detach()  # 0, with the softmax's derivative
        return output + gates[active] * output.detach() + gates[1 - active] * other


class Stem(nn.Module):
    """The first convolution and a bottleneck without expansion: (rows, channels, h, w) -> (rows, stem[1], h / s, w / s)."""

    def __init__(self, channels: int, shape: MobileShape) -> None:
        super().__init__()
        first = [*_convolution(channels, shape.stem[0], 3, shape.stem_stride), nn.ReLU6()]
        self.layers = nn.Sequential(*first, MBConv(shape.stem[0], shape.stem[1], 1, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    """A 1x1 convolution, the mean over the image and a linear layer: (rows, width, h, w) -> (rows, classes)."""

    def __init__(self, width: int, head: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_convolution(width, head, 1, 1), nn.ReLU6())
        self.linear = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(x).mean((2, 3)))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Cells in a row; before the first stage's the stem, behind the last's the head."""

    def __init__(self, stem: nn.Module, cells: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.cells = nn.ModuleList(cells)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.head(x)  # type: ignore[no-any-return]


class SearchStage(Stage):
    """A stage of the supernet.

    While its block is trained, it runs one sampled path, and on the batches that are for alpha two a cell (see `Cell.gated`).
    In eval mode it runs the most likely path. What is drawn follows from the seed, the stage and the batch's number alone, so
    it is the same on every rank and for all shares of a batch.
    """

    def __init__(
        self, stem: nn.Module, cells: Iterable[Cell], head: nn.Module, *, steps: SearchSteps, seed: int, number: int
    ) -> None:
        super().__init__(stem, cells, head)
        self.steps = steps
        self.seed = seed
        self.number = number

    def choices(self) -> list[Cell]:
        """List the cells."""
        return [cell for cell in self.cells if isinstance(cell, Cell)]

    def learns_paths(self) -> bool:
        """Whether the batch that the block is being trained on is for alpha."""
        return self.training and self.steps.learns_paths(batch_number())

    def sampled(self, batch: int) -> list[int]:
        """Draw the path that a batch's weights are trained on."""
        return [cell.sampled(1, *self._seed(batch, place))[0] for place, cell in enumerate(self.choices())]

    def expected_flops(self) -> Tensor:
        """Compute the expected FLOPs of its cells, as a fraction of those of the most expensive path."""
        weights = [max(cell.flops) for cell in self.choices()]
        parts = [cell.expected_flops() * weight for cell, weight in zip(self.choices(), weights, strict=True)]
        return torch.stack(parts).sum() / sum(weights)

    def forward(self, x: Tensor) -> Tensor:
        if self.learns_paths():
            x = untrained(self.stem, x)
            for place, cell in enumerate(self.choices()):
                x = cell.gated(x, *self._seed(batch_number(), place))
            return untrained(self.head, x)
        paths = self.sampled(batch_number()) if self.training else [cell.best() for cell in self.choices()]
        x = self.stem(x)
        for cell, path in zip(self.choices(), paths, strict=True):
            x = cell.operation(path)(x)
        return self.head(x)  # type: ignore[no-any-return]

    def _seed(self, batch: int, place: int) -> tuple[object, ...]:
        return self.seed, "path", self.number, batch, place


class Network(nn.Sequential):
    """Stages in a row, each a block of its own. `paths` are the operations of the cells."""

    def __init__(self, stages: Iterable[Stage], paths: Paths) -> None:
        super().__init__(*stages)
        self.paths = paths

    def pipeline_blocks(self) -> list[str]:
        return [name for name, _ in self.named_children()]


def untrained(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module in its mode, with no gradient for its parameters, and its buffers left as they are."""
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, tensors, (x,))  # type: ignore[no-any-return]


def network(shape: MobileShape, paths: Paths, channels: int, classes: int, seed: int) -> Network:
    """Build a network of some operations for images (rows, channels, h, w) -> logits (rows, classes), initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = []
        for number, chosen in enumerate(paths):
            cells = [_operation(place, path) for place, path in zip(shape.places(number), chosen, strict=True)]
            stem, head = _ends(shape, number, channels, classes)
            stages.append(Stage(stem, cells, head))
    return Network(stages, paths)


def same_path(shape: MobileShape, path: str) -> Paths:
    """Put one operation into all places: "k3e6" makes MobileNetV2."""
    return tuple((path,) * count for count in shape.cells)


def supernet(
    shape: MobileShape, kernels: Sequence[int], expansions: Sequence[int], channels: int, size: int, classes: int,
    *, steps: SearchSteps, seed: int,
) -> nn.Sequential:  # fmt: skip
    """Build the network with all operations in every place: MBConvs of each size, and nothing where the form stays.

    For images (rows, channels, size, size). The stem and the head are as in `network`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "supernet"))
        stages = []
        size = -(-size // shape.stem_stride)
        for number in range(len(shape.widths)):
            cells = []
            for place in shape.places(number):
                cells.append(Cell(place, size, kernels, expansions))
                size = -(-size // place[2])
            stem, head = _ends(shape, number, channels, classes)
            stages.append(SearchStage(stem, cells, head, steps=steps, seed=seed, number=number))
    return nn.Sequential(*stages)


def search_stages(net: nn.Sequential) -> list[SearchStage]:
    """List the stages of a supernet."""
    return [stage for stage in net if isinstance(stage, SearchStage)]


def best_paths(net: nn.Sequential) -> Paths:
    """Find the most likely operation of every cell of a supernet."""
    return tuple(tuple(list(cell.paths)[cell.best()] for cell in stage.choices()) for stage in search_stages(net))


def random_paths(net: nn.Sequential, seed: int) -> Paths:
    """Draw an operation for every cell of a supernet, each as likely as the others."""
    return tuple(
        tuple(
            list(cell.paths)[derive(seed, "random", stage.number, place) % len(cell.paths)]
            for place, cell in enumerate(stage.choices())
        )
        for stage in search_stages(net)
    )


def largest_paths(net: nn.Sequential) -> Paths:
    """Find the operation of every cell that takes most work."""
    return tuple(
        tuple(list(cell.paths)[cell.flops.index(max(cell.flops))] for cell in stage.choices()) for stage in search_stages(net)
    )


def derived(net: nn.Sequential, paths: Paths) -> Network:
    """Build a network of one path of a supernet, with copies of its weights."""
    stages = []
    for stage, chosen in zip(search_stages(net), paths, strict=True):
        cells = [cell.paths[path] for cell, path in zip(stage.choices(), chosen, strict=True)]
        stages.append(copy.deepcopy(Stage(stage.stem, cells, stage.head)))
    return Network(stages, paths)


def count_flops(model: nn.Module, channels: int, size: int) -> int:
    """Count a network's FLOPs for one image (channels, size, size): two for each product and sum of its layers."""
    counter = FlopCounterMode(display=False)
    training = model.training
    model.eval()
    with torch.no_grad(), counter:
        model(torch.zeros(1, channels, size, size))
    model.train(training)
    return int(counter.get_total_flops())


def _operation(place: tuple[int, int, int], path: str) -> nn.Module:
    if path == SKIP:
        return nn.Identity()
    kernel, _, expansion = path.removeprefix("k").partition("e")
    return MBConv(*place, int(kernel), int(expansion))


def _ends(shape: MobileShape, stage: int, channels: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """Build the stem of the first stage, the head of the last, and nothing elsewhere."""
    stem = Stem(channels, shape) if stage == 0 else nn.Identity()
    head = Head(shape.widths[-1], shape.head, classes) if stage == len(shape.widths) - 1 else nn.Identity()
    return stem, head


def _convolution(channels: int, width: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width)]
