"""The blocks of one rank in blockwise training: teacher forwards, training steps of student blocks, updates and moves.

Gradients of a block are added up over the ranks that share its batches while the backward is still under way. A block moves
to another rank together with the state of its optimizer, as tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.model.blockwise.task import Blockwise, BlockwiseContracts, teacher_output, train_block
from pipestill.model.nests import copied
from pipestill.optim import OptimizerFactory, Schedules
from pipestill.runtime.pipeline.stage import move
from pipestill.runtime.pipeline.weights import Trained

_BUCKET_BYTES = 25 * 2**20  # of gradients that are added up together, as in DDP

OwnTensors = dict[str, tuple[Tensor, Tensor | None]]
"""A rank's own weights and buffers of a block, by name, each with its gradient."""


@dataclass(eq=False)
class BlockwiseWorker:
    """Runs and trains the blocks of one rank. It makes an optimizer for each student block that the rank trains.

    `apart` is for ranks that share one process, and so the same modules: this rank then keeps weights, buffers and gradients
    of its student blocks to itself, and puts them into the modules while it works on them.
    """

    task: Blockwise
    contracts: BlockwiseContracts
    device: torch.device
    seed: int
    optimizer: OptimizerFactory
    schedules: Schedules
    apart: bool = False

    def __post_init__(self) -> None:
        self.own: dict[int, OwnTensors] = {}
        """By block, where this rank is `apart`."""
        self.blocks: dict[int, Trained] = {}
        """The parameters of each student block that this rank is training, and their optimizer."""
        self.trained: dict[int, int] = {}
        """How many batches each block's weights on this rank have been trained on."""
        self.loss_sums = torch.zeros(self.task.num_blocks, dtype=torch.float64, device=self.device)
        """By block: the sum of its losses over the batches since they were last logged."""
        self.all_reduces: dict[int, AllReduce] = {}
        """By block: the sum of its gradients over a group, while it is being computed."""
        self.states: dict[int, OptimizerState] = {}
        """By block that moves between ranks: the state of its optimizer."""

    def hold(self, teacher: Sequence[int], student: Sequence[int]) -> None:
        """Put teacher and student blocks on the device, and make the student blocks' optimizers."""
        for block in teacher:
            move(self.task.teacher_blocks, range(block, block + 1), self.device)
        for block in student:
            for tensor in self.task.tensors_of(block).values():
                tensor.data = tensor.data.to(self.device)
            if block not in self.blocks:
                self.blocks[block] = Trained(self.task.parameters_of(block), self.optimizer, self.schedules)
                if self.apart:
                    tensors = self.task.tensors_of(block).items()
                    self.own[block] = {name: (tensor.detach().clone(), None) for name, tensor in tensors}

    @contextmanager
    def _own_tensors(self, block: int) -> Iterator[None]:
        """Have this rank's own weights of a block in the modules in the body, where other ranks use the same modules."""
        if not self.apart:
            yield
            return
        theirs = self._exchange(block, self.own[block])
        try:
            yield
        finally:
            self.own[block] = self._exchange(block, theirs)

    def _exchange(self, block: int, new: Mapping[str, tuple[Tensor, Tensor | None]]) -> OwnTensors:
        """Put tensors and gradients into the modules, and return those that were there."""
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
        """Drop the optimizers of student blocks that are trained to their end, and take the blocks off the device."""
        for block in student:
            self.blocks.pop(block, None)
            for tensor in self.task.tensors_of(block).values():
                tensor.data = tensor.data.cpu()

    def teacher_output(self, block: int, value: Any) -> Any:
        """Run a teacher block forward over some rows."""
        self.task.teacher_blocks.in_mode(train=False)
        return teacher_output(self.task, block, copied(value) if block in self.contracts.teacher_writes else value)

    def train(self, block: int, value: Any, target: Any, weight: float, batch: int, unit: int, group: Any) -> None:
        """Run forward, loss and backward of a student block over some rows of a batch.

        `value` is the block's input, `target` the teacher block's output for the same rows, and `weight` the fraction of the
        batch's rows that they are (0: no rows, and no value). `batch` is the batch's number in the run, `unit` the number of
        these rows among those of the batch; both choose the random numbers. With a `group` of ranks, gradients are added up
        over it (see `reduce`).
        """
        self.task.in_mode(train=True)
        with self._own_tensors(block):
            if group is not None:
                parameters = list(self.blocks[block].parameters.values())
                self.all_reduces[block] = AllReduce(parameters, group, overlap=len(self.task.variants(block)) == 1)
            if weight:
                if block in self.contracts.student_writes:
                    value = copied(value)
                loss = train_block(
                    self.task, block, value, target, weight, seed=self.seed, batch=batch, unit=unit, device=self.device
                )
                self.loss_sums[block] += loss.double()

    def reduce(self, block: int) -> None:
        """Wait until the gradients of a block are the sums over all ranks of its group."""
        self.all_reduces.pop(block).finish()

    def gradients(self, block: int) -> list[Tensor]:
        """A block's gradients, one flat tensor for each parameter (see `flat_gradients`), for ranks of one process to add up."""
        with self._own_tensors(block):
            return [flat_gradients([p]) for p in self.blocks[block].parameters.values()]

    def set_gradients(self, block: int, summed: Sequence[Tensor]) -> None:
        """Set a block's gradients from the sums of `gradients` over ranks."""
        with self._own_tensors(block):
            for parameter, flat in zip(self.blocks[block].parameters.values(), summed, strict=True):
                set_flat_gradients([parameter], flat)

    def update(self, block: int, batch: int) -> None:
        """Make the optimizer's step after batch number `batch` of the run."""
        with self._own_tensors(block):
            self.blocks[block].update(batch)
        self.trained[block] = batch + 1

    # -- blocks that move between ranks -----------------------------------------------------------------------------

    def state_forms(self, block: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of the tensors that `state` gives, also on ranks that have not trained the block yet."""
        state = self.states[block] = OptimizerState(self.optimizer, self.task.parameters_of(block))
        return [(tuple(t.shape), t.dtype) for t in (*self.task.tensors_of(block).values(), *state.examples)]

    def state(self, block: int) -> list[Tensor]:
        """Copies of a block's weights, buffers and optimizer state, to be sent."""
        trained, packed = self.blocks[block], list[Tensor]()
        if trained.optimizer is not None:
            packed = self.states[block].pack(trained.optimizer, list(trained.parameters.values()))
        with self._own_tensors(block):
            tensors = (*self.task.tensors_of(block).values(), *packed)
            return [t.detach().clone().to(self.device) for t in tensors]  # optimizers keep some of theirs on the CPU

    def set_state(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Take over a block from another rank, from what its `state` gave."""
        trained, own = self.blocks[block], list(self.task.tensors_of(block).values())
        with torch.no_grad(), self._own_tensors(block):
            for mine, theirs in zip(own, tensors, strict=False):
                mine.copy_(theirs.view_as(mine))
        if trained.optimizer is not None:
            self.states[block].unpack(trained.optimizer, list(trained.parameters.values()), tensors[len(own) :])


class OptimizerState:
    """The layout of the state that an optimizer keeps of named parameters: the same on every rank that holds the block.

    It is found out by a step of an optimizer over copies of the parameters, with gradients of zero.
    """

    def __init__(self, make: OptimizerFactory, parameters: Mapping[str, nn.Parameter]) -> None:
        self.templates: list[dict[str, Any]] = []
        """For each parameter: the name of each value of its state, and an example."""
        self.examples: list[Tensor] = []
        """Tensors of the shapes and types that `pack` gives."""
        if parameters:
            copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
            for copy in copies.values():
                copy.grad = torch.zeros_like(copy)
            optimizer = make(copies)
            optimizer.step()
            self.templates = [dict(optimizer.state.get(copy, {})) for copy in copies.values()]
            self.examples = self.pack(optimizer, list(copies.values()))

    def pack(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """List which parameters have a state (one number each), then all values of the states in the order of the templates."""
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        packed = [torch.tensor([float(bool(state)) for state in states])]
        for parameter, state, template in zip(parameters, states, self.templates, strict=True):
            for name, example in sorted(template.items()):
                value = state.get(name, example)
                if isinstance(value, Tensor):
                    packed.append(value)
                elif isinstance(value, (int, float)):
                    packed.append(torch.tensor(float(value), dtype=torch.float64))
                elif value is not None:
                    raise ModelError(
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} ('{name}') for a parameter of shape "
                        f"{tuple(parameter.shape)}, which cannot move between ranks; use another strategy than 'balanced', "
                        "or an optimizer whose state consists of tensors and numbers"
                    )
        return packed

    def unpack(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], packed: Sequence[Tensor]) -> None:
        """Give an optimizer the state that `pack` took from another."""
        has_state, rest = packed[0].tolist(), iter(packed[1:])
        for parameter, template, known in zip(parameters, self.templates, has_state, strict=True):
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


class AllReduce:
    """One all-reduce of a block's gradients, in buckets.

    With `overlap`, a bucket goes out as soon as its last gradient is computed; that needs a single backward, after which a
    gradient is complete. Buckets go out in the same order on all ranks.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup, *, overlap: bool) -> None:
        self.group = group
        self.buckets = _buckets(parameters)
        self.under_way: list[tuple[Tensor, Any]] = []
        """The flat gradients of each bucket that has gone out, and its work."""
        self.ready = set[nn.Parameter]()
        """Parameters whose gradient is computed."""
        self.hooks = [p.register_post_accumulate_grad_hook(self._computed) for p in parameters] if overlap else []

    def _computed(self, parameter: nn.Parameter) -> None:
        self.ready.add(parameter)
        while len(self.under_way) < len(self.buckets) and self.ready.issuperset(self.buckets[len(self.under_way)]):
            self._send_next()

    def _send_next(self) -> None:
        flat = flat_gradients(self.buckets[len(self.under_way)])
        self.under_way.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    def finish(self) -> None:
        """Send the buckets that are left, wait for all, and put the sums in the place of the gradients."""
        for hook in self.hooks:
            hook.remove()
        while len(self.under_way) < len(self.buckets):
            self._send_next()
        for bucket, (flat, work) in zip(self.buckets, self.under_way, strict=True):
            work.wait()
            set_flat_gradients(bucket, flat)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one type together, up to `_BUCKET_BYTES`, last first: in the order in which a backward ends."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not buckets or room < size or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= size
    return buckets


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradients of one type one after the other, zeros for those that are missing; then, for each, 1 if it is there.

    They are in one tensor, because one more all-reduce takes longer than all the gradients of a small block.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = [p.grad is not None for p in parameters]
    first = parameters[0]
    return torch.cat(
        [*(gradient.reshape(-1) for gradient in gradients), torch.tensor(there, dtype=first.dtype, device=first.device)]
    )


def set_flat_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Set the gradients from a sum of `flat_gradients` over ranks; a gradient that no rank had is None."""
    *values, there = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for parameter, part, number in zip(parameters, values, there.tolist(), strict=True):
        parameter.grad = part.view_as(parameter).clone() if number else None
