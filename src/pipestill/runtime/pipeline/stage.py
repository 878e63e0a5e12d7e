"""A stage: consecutive blocks of one role that one rank runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import DeviceError, ModelError
from pipestill.model.batchnorm import Norms
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import detached, start_graph, start_of
from pipestill.model.contracts import Contract
from pipestill.model.nests import distinct_tensors
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.seeding import seed_block
from pipestill.model.split import SplitBlock
from pipestill.model.tasks import Momentum, Task, teacher_trains
from pipestill.optim import OptimizerFactory, Schedules
from pipestill.runtime.pipeline.weights import MovingAverage, Versions
from pipestill.schedule import Role


def run_blocks(
    model: BlockModel,
    blocks: range,
    value: Any,
    role: Role,
    *,
    seed: int,
    step: int,
    unit: int,
    device: torch.device,
) -> Any:
    """The value after `blocks`, each with its own random numbers (see `seed_block`)."""
    for i in blocks:
        seed_block(seed, role, i, step, unit, device)
        value = model.blocks[i].call(value)
    return value


def weighted_loss(parts: dict[str, Tensor], share: float) -> Tensor:
    """The part of a batch's mean loss that a microbatch with `share` of its rows gives."""
    total = torch.stack(list(parts.values())).sum() if len(parts) > 1 else next(iter(parts.values()))
    return total * share


def guard_batch(value: Any) -> Callable[[str], None]:
    """A check that nobody wrote to the tensors of a batch, which both models read: call it after a forward."""
    versions = [(tensor, tensor._version) for tensor in distinct_tensors(value)]

    def unchanged(who: str) -> None:
        if any(tensor._version != version for tensor, version in versions):
            raise ModelError(
                f"the first block of the {who} changes its input in place, and the other model reads it too"
            )

    return unchanged


class TeacherStage:
    """Runs forward without gradients, and moves its weights towards the student's where they are an average of these."""

    def __init__(self, task: Task, blocks: range, device: torch.device, seed: int, norms: Norms) -> None:
        assert task.teacher_blocks is not None
        self.model, self.blocks, self.device, self.seed = task.teacher_blocks, blocks, device, seed
        self.train = teacher_trains(task)
        self.norms, self.modules = norms, self.model.modules_of(blocks)
        move(self.model, blocks, device)
        self.model.in_mode(train=self.train)
        self.average = MovingAverage(task, blocks) if isinstance(task, Momentum) else None

    def forward(self, value: Any, step: int, unit: int) -> Any:
        self.model.in_mode(train=self.train)
        with torch.no_grad():
            return run_blocks(
                self.model, self.blocks, value, Role.TEACHER, seed=self.seed, step=step, unit=unit, device=self.device
            )

    def end_batch(self) -> None:
        """All forwards of a batch are over."""
        self.norms.end_batch(self.modules)

    def note(self) -> None:
        """The student has just been updated: a later move copies its buffers as they are now."""
        if self.average is not None:
            self.average.note()

    def follow(self, step: int) -> None:
        """Move after the update of `step`."""
        assert self.average is not None
        self.average.move(step)


@dataclass
class _Held:
    """What lies between a forward and its backward: gradients of the input to fill, the outputs that travel, and the
    blocks of a backward in halves.
    """

    received: list[Tensor | None]
    outputs: list[Tensor]
    blocks: list[tuple[SplitBlock | None, list[Tensor], list[Tensor | None]]]


class StudentStage:
    """Runs forward and backward, keeps what lies between them, accumulates gradients and updates its weights.

    `staleness`: steps read the weights of that many updates before; the old ones are kept as long. `split`: backwards come
    in two halves, `unsplit` are the blocks whose backward is all in the first.
    """

    def __init__(
        self,
        task: Task,
        contracts: PipelineContracts,
        blocks: range,
        device: torch.device,
        seed: int,
        optimizer: OptimizerFactory,
        norms: Norms,
        *,
        schedules: Schedules,
        split: bool = False,
        staleness: int = 0,
    ) -> None:
        self.task, self.contracts, self.blocks, self.device, self.seed = task, contracts, blocks, device, seed
        self.halves, self.views = split, task.demands.views
        self.model = task.student_blocks
        of_blocks = [self.model.parameters_of(range(i, i + 1)) for i in blocks]
        shares = sum(map(len, of_blocks)) > len(self.model.parameters_of(blocks))
        self.split = split and not shares  # gradients of a weight of two blocks add up inside one backward
        self.norms, self.modules = norms, self.model.modules_of(blocks)
        move(self.model, blocks, device)
        self.parameters = {n: p for n, p in self.model.parameters_of(blocks).items() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.grad = None  # what was left from before is no part of the first batch
        self.optimizer = optimizer(self.parameters) if self.parameters else None
        self.rates = schedules.rates(self.optimizer) if self.optimizer else None
        self.versions = Versions(list(self.parameters.values()), staleness)
        self.stash: dict[tuple[int, int], _Held] = {}
        self.from_loss: dict[tuple[int, int], tuple[list[Tensor], list[Tensor | None]]] = {}  # outputs, their gradients
        self.loss_sums = torch.zeros(len(contracts.loss_parts), dtype=torch.float64, device=device)
        if blocks.stop == len(self.model) and isinstance(task.loss, nn.Module):
            task.loss.to(device)

    def _contract(self, unit: int, block: int, length: int | None = None) -> Contract:
        """Of a boundary: as to its form at any length, or with the sizes of one."""
        contracts = self.contracts if length is None else self.contracts.at(length)
        return contracts.student[unit % self.views][block]

    def enter(self, tensors: Sequence[Tensor], rows: int, unit: int, length: int) -> tuple[Any, list[Tensor | None]]:
        """Received tensors -> the first block's input, and the list that the backward fills with its gradients."""
        contract = self._contract(unit, self.blocks[0] - 1, length)
        entered, gradients = start_graph([tensors[i] for i in contract.tracked_positions])
        given = list(tensors)
        for i, tensor in zip(contract.tracked_positions, entered, strict=True):
            given[i] = tensor
        return contract.join(given, rows), gradients

    def forward(self, value: Any, gradients: list[Tensor | None], step: int, unit: int, rows: int, length: int) -> Any:
        """The stage's output, its graph kept for `backward`. `gradients`: what `enter` gave with the value."""
        self.model.in_mode(train=True)
        with self.versions.of(step):
            if self.split:
                output, blocks = self._forward_split(value, step, unit)
            else:
                blocks = []
                output = run_blocks(
                    self.model,
                    self.blocks,
                    value,
                    Role.STUDENT,
                    seed=self.seed,
                    step=step,
                    unit=unit,
                    device=self.device,
                )
        contract = self._contract(unit, self.blocks[-1], length)
        self.stash[step, unit] = _Held(gradients, contract.split(output, rows), blocks)
        return output

    def _forward_split(
        self, value: Any, step: int, unit: int
    ) -> tuple[Any, list[tuple[SplitBlock | None, list[Tensor], list[Tensor | None]]]]:
        """Block by block, cut between them. Of each: its halves, its outputs, and their gradients once these are there."""
        blocks: list[tuple[SplitBlock | None, list[Tensor], list[Tensor | None]]] = []
        output = value
        for i in self.blocks:
            start = start_of(value)
            output = run_blocks(
                self.model,
                range(i, i + 1),
                value,
                Role.STUDENT,
                seed=self.seed,
                step=step,
                unit=unit,
                device=self.device,
            )
            halves = None if i in self.contracts.unsplit else SplitBlock(start)
            if i == self.blocks[-1]:
                blocks.append((halves, [], []))
            else:
                value, tracked, gradients = detached(output)
                blocks.append((halves, tracked, gradients))
        return output, blocks

    def end_batch(self) -> None:
        """All forwards of a batch are over."""
        self.norms.end_batch(self.modules)

    def infer(self, value: Any, step: int, unit: int) -> Any:
        """The stage's output for validation: no gradients, nothing kept."""
        self.model.in_mode(train=False)
        with torch.no_grad():
            return run_blocks(
                self.model, self.blocks, value, Role.STUDENT, seed=self.seed, step=step, unit=unit, device=self.device
            )

    def loss(
        self, number: int, outputs: Mapping[int, Any], teacher: Mapping[int, Any], target: Any, step: int, weight: float
    ) -> None:
        """Evaluate a loss of the outputs of some units (of both models) and take its gradients with regard to them."""
        seed_block(self.seed, Role.STUDENT, len(self.model), step, number, self.device)
        cuts = {unit: detached(output) for unit, output in outputs.items()}
        parts = evaluate_loss(self.task, {unit: value for unit, (value, _, _) in cuts.items()}, teacher, target)
        if tuple(parts) != self.contracts.loss_parts:
            raise ModelError(
                f"the loss had the parts {', '.join(self.contracts.loss_parts)} on the sample batch and now has "
                f"{', '.join(parts)}; it must always give the same ones, in the same order"
            )
        self.loss_sums += torch.stack([part.detach().double() for part in parts.values()]) * weight
        weighted_loss(parts, weight).backward()
        for unit, (_, tracked, gradients) in cuts.items():
            self.from_loss[step, unit] = (tracked, gradients)

    def take_losses(self) -> dict[str, float]:
        """The parts of the batch's mean loss, once all its microbatches are through; starts the next sum."""
        sums, self.loss_sums = self.loss_sums, torch.zeros_like(self.loss_sums)
        return dict(zip(self.contracts.loss_parts, sums.tolist(), strict=True))

    def backward(self, gradients: Sequence[Tensor] | None, step: int, unit: int) -> list[Tensor]:
        """Accumulate the weights' gradients; returns those of the input leaves. `gradients` None: from the loss.

        Where backwards come in halves, this is the first, and the gradients of weights that can wait are left to
        `weight_gradients`.
        """
        held = self.stash[step, unit] if self.halves else self.stash.pop((step, unit))
        pairs: Iterable[tuple[Tensor, Tensor | None]]
        if gradients is None:
            pairs = zip(*self.from_loss.pop((step, unit)), strict=True)
        else:
            positions = self._contract(unit, self.blocks[-1]).gradient_positions
            pairs = [(held.outputs[i], gradient) for i, gradient in zip(positions, gradients, strict=True)]
        roots = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
        with self.versions.of(step):
            if self.split:
                for halves, tracked, came in reversed(held.blocks):
                    if tracked or came:
                        roots = [(o, g) for o, g in zip(tracked, came, strict=True) if g is not None]
                    if roots and halves is None:
                        _whole(roots)
                    elif roots and halves is not None:
                        halves.input_half(roots)
                    roots = []
            elif roots:
                _whole(roots)
        sent = self._input_gradients(held.received, unit)
        held.received, held.outputs = [], []  # what is kept for the second half is in the blocks
        held.blocks = [(halves, [], []) for halves, _, _ in held.blocks]
        return sent

    def weight_gradients(self, step: int, unit: int) -> None:
        """The second half of a backward."""
        held = self.stash.pop((step, unit))
        with self.versions.of(step):
            for halves, _, _ in reversed(held.blocks):
                if halves is not None:
                    halves.weight_half()

    def _input_gradients(self, received: list[Tensor | None], unit: int) -> list[Tensor]:
        """What goes back to the stage before; `ModelError` when that is not what came back on the sample batch."""
        if not received:
            return []
        contract = self._contract(unit, self.blocks[0] - 1)
        sent = []
        for i, gradient in zip(contract.tracked_positions, received, strict=True):
            expected = contract.tensor_leaves[i].gradient is not None
            if expected != (gradient is not None):
                raise ModelError(
                    f"student block {self.blocks[0]} ('{self.model.blocks[self.blocks[0]].name}'): "
                    f"{'no' if expected else 'a'} gradient came back for an input that had "
                    f"{'one' if expected else 'none'} on the sample batch; a model may not choose per batch what it uses"
                )
            if gradient is not None:
                sent.append(gradient)
        return sent

    def clip(self, squares: Tensor, largest: float) -> None:
        """Scale the gradients so that the norm of those of all stages, whose `squares` these are, is at most `largest`."""
        clip(list(self.parameters.values()), squares, largest)

    def update(self, step: int) -> None:
        """Make the optimizer's step, at the learning rates and weight decays of `step`."""
        with self.versions.next():
            if self.optimizer is not None and self.rates is not None:
                self.rates.set(step)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)


def _whole(roots: list[tuple[Tensor, Tensor]]) -> None:
    torch.autograd.backward([output for output, _ in roots], [gradient for _, gradient in roots])


def evaluate_loss(task: Task, student: Mapping[int, Any], teacher: Mapping[int, Any], target: Any) -> dict[str, Tensor]:
    """The loss of the outputs of units, which are joined to one output a view."""
    demands = task.demands
    outputs = [_joined(student, demands.views, v) for v in range(demands.views)]
    taught = [_joined(teacher, demands.teacher_views, v) for v in range(demands.teacher_views)] if teacher else []
    return task.loss_parts(outputs, taught, target)


def _joined(outputs: Mapping[int, Any], views: int, view: int) -> Any:
    parts = [outputs[unit] for unit in sorted(outputs) if unit % views == view]
    return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *tensors: torch.cat(tensors), *parts)


def clip(parameters: Sequence[nn.Parameter], squares: Tensor, largest: float) -> None:
    """Scale gradients by what brings the norm whose squares add up from `squares` down to `largest`, if it is more."""
    norm = math.sqrt(math.fsum(squares.tolist()))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if norm > largest and gradients:
        torch._foreach_mul_(gradients, largest / norm)


def move(model: BlockModel, blocks: range, device: torch.device) -> None:
    """Put the parameters and buffers of `blocks` on `device`, in place."""
    for tensor in model.tensors_of(blocks).values():
        tensor.data = tensor.data.to(device)


@contextmanager
def placed(task: Task, device: torch.device) -> Iterator[None]:
    """Within it, both models and the loss are whole on `device`; afterwards on the CPU. `DeviceError` where they do not fit."""
    models = [model for model in (task.student_blocks, task.teacher_blocks) if model is not None]

    def to(there: torch.device) -> None:
        for model in models:
            move(model, range(len(model)), there)
        if isinstance(task.loss, nn.Module):
            task.loss.to(there)

    try:
        to(device)
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"both models and a microbatch do not fit on one device, where blocks are measured ({str(error).split('.')[0]}); "
            "give a file of costs (--costs, made by 'pipestill profile' with '--device cpu' or with '--estimate')"
        ) from error
    finally:
        to(torch.device("cpu"))


def gradient_squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The squared norm of each parameter's gradient, 0 without one: float64, on the CPU."""
    squares = [
        p.new_zeros((), dtype=torch.float64)
        if p.grad is None
        else torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for p in parameters
    ]
    return torch.stack(squares).cpu() if squares else torch.zeros(0, dtype=torch.float64)
