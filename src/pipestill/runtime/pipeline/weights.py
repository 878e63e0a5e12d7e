"""Weights that a rank trains, older versions of them for steps that read stale ones, and a momentum teacher's average."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipestill.model.blocks import BlockModel
from pipestill.model.tasks import Momentum
from pipestill.optim import OptimizerFactory, Schedules


class Trained:
    """Parameters that one rank trains, and their optimizer; there is none without parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: OptimizerFactory, schedules: Schedules) -> None:
        self.parameters = parameters
        for parameter in parameters.values():
            parameter.grad = None  # what was left from before is no part of the first batch
        self.optimizer = optimizer(parameters) if parameters else None
        self.rates = schedules.rates(self.optimizer) if self.optimizer else None

    def update(self, step: int) -> None:
        """Make the optimizer's step, at the learning rates and weight decays of `step`."""
        if self.optimizer is not None and self.rates is not None:
            self.rates.set(step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class MovingAverage:
    """Moves a teacher's weights in some blocks towards the student's."""

    def __init__(self, task: Momentum, blocks: range) -> None:
        self.task = task
        self.blocks = blocks
        pairs = _paired(task.teacher_blocks.parameters_of(blocks), task.student_blocks.parameters_of(blocks))
        self.pairs = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]

        self.noted: deque[dict[str, Tensor]] = deque()
        """Copies of the student's buffers after each update that the teacher has not followed yet."""

    def note(self) -> None:
        """Copy the student's buffers for the next move: forwards before it may change them."""
        if self.task.teacher_buffers == "copy":
            self.noted.append({n: t.clone() for n, t in self._buffers(self.task.student_blocks).items()})

    def _buffers(self, model: BlockModel) -> dict[str, Tensor]:
        """The buffers of the blocks as they are now: a forward may have replaced them."""
        return {n: t for n, t in model.tensors_of(self.blocks).items() if not isinstance(t, nn.Parameter)}

    @torch.no_grad()
    def move(self, step: int) -> None:
        """Set the teacher to m * teacher + (1 - m) * student, with the momentum of `step`."""
        if self.pairs:
            move_all = get_ema_multi_avg_fn(self.task.momentum_at(step))
            move_all([mine.detach() for mine, _ in self.pairs], [theirs.detach() for _, theirs in self.pairs], None)
        if self.noted:
            for mine, theirs in _paired(self._buffers(self.task.teacher_blocks), self.noted.popleft()):
                mine.copy_(theirs)


def _paired(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, student[name]) for name, tensor in teacher.items() if name in student]


class Versions:
    """The newest weights, and as many older versions as `staleness` says: step k reads version k - `staleness`.

    With a staleness, the optimizer writes to new memory, so that graphs of earlier forwards keep what they saved.
    """

    def __init__(self, parameters: list[nn.Parameter], staleness: int) -> None:
        self.parameters = parameters
        self.staleness = staleness
        self.newest = 0
        self.old: dict[int, list[Tensor]] = {}
        """By version."""

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Have the version that `step` reads in the parameters, in the body."""
        version = max(0, step - self.staleness)
        if not self.staleness or version == self.newest:
            yield
            return
        newest = [parameter.data for parameter in self.parameters]
        self._set(self.old[version])
        try:
            yield
        finally:
            self._set(newest)

    @contextmanager
    def next(self) -> Iterator[None]:
        """Let the body make the next version."""
        if not self.staleness:
            yield
            return
        self.old[self.newest] = [parameter.data for parameter in self.parameters]
        self.old.pop(self.newest - self.staleness, None)
        self._set([tensor.clone() for tensor in self.old[self.newest]])
        with ExitStack() as counters:
            for parameter in self.parameters:
                counters.enter_context(torch.autograd.grad_mode._unsafe_preserve_version_counter(parameter))
            yield
        self.newest += 1

    def _set(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor
