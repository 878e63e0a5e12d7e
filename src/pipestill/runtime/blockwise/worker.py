"""What one rank does to blocks that learn alone: teacher forwards, students' steps, shared gradients, updates, moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.model.blockwise.contracts import BlockwiseContracts
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.blockwise.training import teacher_output, train_block
from pipestill.model.nests import copied
from pipestill.optim import OptimizerFactory
from pipestill.runtime.pipeline.stage import move
from pipestill.runtime.pipeline.weights import OwnRates

_BUCKET_BYTES = 25 * 2**20  # of gradients that are added up together, as in DDP


class Learner:
    """A student block with its optimizer, on one rank."""

    def __init__(self, task: Blockwise, block: int, optimizer: OptimizerFactory) -> None:
        self.parameters = task.parameters_of(block)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.optimizer = optimizer(self.parameters) if self.parameters else None
        self.rates = OwnRates(self.optimizer)

    def update(self, lr_factor: float) -> None:
        """One optimizer step at `lr_factor` times each group's own learning rate."""
        if self.optimizer is None:
            return
        self.rates.multiply(lr_factor, decay_factor=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class BlockwiseWorker:
    """The blocks of one rank. `optimizer(parameters)` is made for each student block that the rank ever trains.

    `apart`: other ranks of this process have the same modules, so this one keeps weights, buffers and gradients of the
    student blocks that it trains to itself, and puts them into the modules while it works on them.
    """

    def __init__(
        self,
        task: Blockwise,
        contracts: BlockwiseContracts,
        *,
        device: torch.device,
        seed: int,
        optimizer: OptimizerFactory,
        lr_factor: Callable[[int], float],
        apart: bool = False,
    ) -> None:
        self.task, self.contracts, self.device, self.seed = task, contracts, device, seed
        self.optimizer, self.lr_factor, self.apart = optimizer, lr_factor, apart
        self.own: dict[int, dict[str, tuple[Tensor, Tensor | None]]] = {}
        self.learners: dict[int, Learner] = {}
        self.trained: dict[int, int] = {}
        """How many batches each block's weights on this rank have seen."""
        self.loss_sums = torch.zeros(task.num_blocks, dtype=torch.float64, device=device)
        self.reducing: dict[int, _Reduction] = {}
        self.templates: dict[int, list[dict[str, Any]]] = {}

    def hold(self, teacher: Sequence[int], student: Sequence[int]) -> None:
        """Put blocks on the device, and make the optimizers of the student's."""
        for block in teacher:
            move(self.task.teacher_blocks, range(block, block + 1), self.device)
        for block in student:
            for tensor in self.task.tensors_of(block).values():
                tensor.data = tensor.data.to(self.device)
            if block not in self.learners:
                self.learners[block] = Learner(self.task, block, self.optimizer)
                if self.apart:
                    tensors = self.task.tensors_of(block).items()
                    self.own[block] = {name: (tensor.detach().clone(), None) for name, tensor in tensors}

    @contextmanager
    def _with(self, block: int) -> Iterator[None]:
        """This rank's own weights of a block in the modules, where other ranks' are in turn."""
        if not self.apart:
            yield
            return
        theirs = self._exchange(block, self.own[block])
        try:
            yield
        finally:
            self.own[block] = self._exchange(block, theirs)

    def _exchange(
        self, block: int, new: Mapping[str, tuple[Tensor, Tensor | None]]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        old = {}
        for name, tensor in self.task.tensors_of(block).items():
            old[name] = tensor.data, tensor.grad
            if name in new:
                tensor.data, tensor.grad = new[name]
        return old

    def publish(self, block: int) -> None:
        """Leave this rank's weights of a block in the modules."""
        if self.apart:
            self._exchange(block, {name: (data, None) for name, (data, _) in self.own[block].items()})

    def release(self, student: Sequence[int]) -> None:
        """Drop the optimizers of blocks that are trained to their end, and take them off the device."""
        for block in student:
            self.learners.pop(block, None)
            for tensor in self.task.tensors_of(block).values():
                tensor.data = tensor.data.cpu()

    def teach(self, block: int, value: Any) -> Any:
        """What a teacher block makes of its rows."""
        self.task.teacher_blocks.in_mode(train=False)
        return teacher_output(self.task, block, copied(value) if block in self.contracts.teacher_writes else value)

    def learn(self, block: int, value: Any, target: Any, share: float, batch: int, unit: int, group: Any) -> None:
        """Forward, loss and backward of a student block on `share` of a batch's rows (0: none, and no value).

        With a `group` of ranks, gradients are added up over it, in buckets, as soon as they are there (see `reduce`).
        """
        self.task.in_mode(train=True)
        with self._with(block):
            self._learn(block, value, target, share, batch, unit, group)

    def _learn(self, block: int, value: Any, target: Any, share: float, batch: int, unit: int, group: Any) -> None:
        learner = self.learners[block]
        if group is not None:
            overlap = len(self.task.variants(block)) == 1
            self.reducing[block] = _Reduction(list(learner.parameters.values()), group, overlap)
        if share:
            if block in self.contracts.student_writes:
                value = copied(value)
            loss = train_block(
                self.task, block, value, target, share, seed=self.seed, batch=batch, unit=unit, device=self.device
            )
            self.loss_sums[block] += loss.double()

    def reduce(self, block: int) -> None:
        """Wait until the gradients of a block are those of all ranks of its group."""
        self.reducing.pop(block).finish()

    def gradients(self, block: int) -> list[Tensor]:
        """A block's gradients, each with whether it is there: what ranks of one process add up."""
        with self._with(block):
            return [flat_gradients([p]) for p in self.learners[block].parameters.values()]

    def set_gradients(self, block: int, summed: Sequence[Tensor]) -> None:
        """Take what came of adding up `gradients`."""
        with self._with(block):
            for parameter, flat in zip(self.learners[block].parameters.values(), summed, strict=True):
                set_flat_gradients([parameter], flat)

    def update(self, block: int, batch: int) -> None:
        """The optimizer's step after batch number `batch` of the run."""
        with self._with(block):
            self.learners[block].update(self.lr_factor(batch))
        self.trained[block] = batch + 1

    # -- blocks that move ---------------------------------------------------------------------------------------

    def state_forms(self, block: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of what `state` gives, found out with a step of an optimizer over copies."""
        copies = {n: nn.Parameter(p.detach().clone()) for n, p in self.task.parameters_of(block).items()}
        memory: list[Tensor] = []
        if copies:
            for copy in copies.values():
                copy.grad = torch.zeros_like(copy)
            stepper = self.optimizer(copies)
            stepper.step()
            self.templates[block] = [dict(stepper.state.get(copy, {})) for copy in copies.values()]
            memory = _remembered(stepper, list(copies.values()), self.templates[block])
        return [(tuple(t.shape), t.dtype) for t in (*self.task.tensors_of(block).values(), *memory)]

    def state(self, block: int) -> list[Tensor]:
        """Weights, buffers and optimizer state of a block, to be sent."""
        learner, memory = self.learners[block], list[Tensor]()
        if learner.optimizer is not None:
            memory = _remembered(learner.optimizer, list(learner.parameters.values()), self.templates[block])
        with self._with(block):
            tensors = (*self.task.tensors_of(block).values(), *memory)
            return [t.detach().clone().to(self.device) for t in tensors]  # optimizers keep some of theirs on the CPU

    def set_state(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Take over a block from another rank, as its `state` gave it."""
        learner, own = self.learners[block], list(self.task.tensors_of(block).values())
        with torch.no_grad(), self._with(block):
            for mine, theirs in zip(own, tensors, strict=False):
                mine.copy_(theirs.view_as(mine))
        if learner.optimizer is not None:
            rest = tensors[len(own) :]
            _remember(learner.optimizer, list(learner.parameters.values()), self.templates[block], rest)


class _Reduction:
    """Gradients of a block, added up over a group in buckets: each goes out as soon as its last gradient is there.

    Buckets go out in one order on all ranks. `overlap`: the backward is one, so a gradient that is there is complete.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup, overlap: bool) -> None:
        self.group = group
        self.buckets: list[list[nn.Parameter]] = []
        room = 0
        for parameter in reversed(parameters):  # a backward ends with the first
            size = parameter.numel() * parameter.element_size()
            if not self.buckets or room < size or self.buckets[-1][0].dtype != parameter.dtype:
                self.buckets.append([])
                room = _BUCKET_BYTES
            self.buckets[-1].append(parameter)
            room -= size
        self.under_way: list[tuple[Tensor, Any]] = []
        self.ready = set[nn.Parameter]()
        self.hooks = [p.register_post_accumulate_grad_hook(self._hear) for p in parameters] if overlap else []

    def _hear(self, parameter: nn.Parameter) -> None:
        self.ready.add(parameter)
        while len(self.under_way) < len(self.buckets) and self.ready.issuperset(self.buckets[len(self.under_way)]):
            self._send()

    def _send(self) -> None:
        flat = flat_gradients(self.buckets[len(self.under_way)])
        self.under_way.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    def finish(self) -> None:
        """Send what is left, and put the sums in the place of the gradients once all have come."""
        for hook in self.hooks:
            hook.remove()
        while len(self.under_way) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.under_way, strict=True):
            work.wait()
            set_flat_gradients(bucket, flat)


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradients of one type one after the other, zeros for those that are missing; then, for each, 1 if it is there.

    In one tensor, because one more all-reduce takes longer than all the gradients of a small block.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = [p.grad is not None for p in parameters]
    first = parameters[0]
    return torch.cat(
        [*(gradient.reshape(-1) for gradient in gradients), torch.tensor(there, dtype=first.dtype, device=first.device)]
    )


def set_flat_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Take sums of `flat_gradients`; a gradient that no rank had is none."""
    *values, there = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for parameter, part, number in zip(parameters, values, there.tolist(), strict=True):
        parameter.grad = part.view_as(parameter).clone() if number else None


def _remembered(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], templates: Sequence[dict[str, Any]]
) -> list[Tensor]:
    """Which parameters an optimizer remembers something of, and all of that in the order of the templates."""
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    kept = [torch.tensor([float(bool(state)) for state in states])]
    for parameter, state, template in zip(parameters, states, templates, strict=True):
        for name, example in sorted(template.items()):
            value = state.get(name, example)
            if isinstance(value, Tensor):
                kept.append(value)
            elif isinstance(value, (int, float)):
                kept.append(torch.tensor(float(value), dtype=torch.float64))
            elif value is not None:
                raise ModelError(
                    f"{type(optimizer).__name__} remembers a {type(value).__name__} ('{name}') of a parameter "
                    f"{tuple(parameter.shape)}, which cannot move between ranks; use another strategy than 'balanced', or an "
                    "optimizer whose memory is tensors and numbers"
                )
    return kept


def _remember(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    templates: Sequence[dict[str, Any]],
    tensors: Sequence[Tensor],
) -> None:
    """Put what `_remembered` gave elsewhere into an optimizer."""
    there, rest = tensors[0].tolist(), iter(tensors[1:])
    for parameter, template, known in zip(parameters, templates, there, strict=True):
        state: dict[str, Any] = {}
        for name, example in sorted(template.items()):
            if isinstance(example, Tensor):
                state[name] = next(rest).view_as(example).to(example.device, copy=True)
            elif isinstance(example, (int, float)):
                state[name] = type(example)(next(rest).item())  # 5 or 5.0, as it was
            else:
                state[name] = None
        if known:
            optimizer.state[parameter] = state
        else:
            optimizer.state.pop(parameter, None)
