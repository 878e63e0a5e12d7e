"""The reference strategy: a plain loop on one device. It is the specification: every other strategy equals it bit for bit.

Step k takes one batch:

    batch of B rows
      |
      |  split into microbatches: 0, 1, ... whose sizes differ by at most one row, the larger ones first; none is empty
      v
    for each group of microbatches that share one loss: each microbatch by itself, or with a batch loss all of them
      |
      |  1. for each microbatch: the teacher's forward of every view that it sees     -> teacher outputs, without a graph
      |                          the student's forward of every view                  -> student outputs
      |  2. the loss of these outputs, each part times its factor                     -> gradients of the student outputs
      |  3. for each student output, in the same order: its backward                  -> gradients of weights, which add up
      v
      4. deferred batch norm moves its running statistics
      5. clip the gradients by their global norm, if asked to
      6. optimizer step at the learning rates and weight decays of step k             -> student version k + 1
      7. momentum only: teacher = m_k * teacher + (1 - m_k) * student                 -> teacher version k + 1

The factor of a part is (rows of the group) / B, for parts are means over rows. Where the loss counts a part (`Batch.counts`), the
part is a sum over what counts, and its factor 1 / the batch's count, or 0 where that is 0.

Step k reads version k of all weights. With a staleness of 1 it reads version k - 1 (and step 0 version 0). A unit is one
microbatch in one view: unit u of a model that sees V views is view u % V of microbatch u // V. Random numbers of a block follow
from (seed, model, block, step, unit), so they do not depend on what ran before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.losses.step import at_step
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import detached
from pipestill.model.nests import copied, rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.seeding import seed_block
from pipestill.model.tasks import Momentum, Task, teacher_trains, view
from pipestill.runtime.batch import Batch, Microbatch, split_batch
from pipestill.runtime.pipeline.stage import clip, evaluate_loss, gradient_squares, run_blocks, weighted_loss
from pipestill.runtime.pipeline.weights import MovingAverage
from pipestill.runtime.settings import PipelineSettings
from pipestill.schedule import Role


@dataclass(eq=False)
class Reference:
    """Trains a task's student by the plain loop. The models are on `device` already; gradients of before are dropped.

    `first_step` is the number of the first batch's step, where a run goes on from a state; then both stalenesses are 0.
    The numbers in the comments are those of the table above.
    """

    task: Task
    contracts: PipelineContracts
    settings: PipelineSettings
    device: torch.device
    num_microbatches: int
    staleness: int = 0
    student_staleness: int = 0
    first_step: int = 0

    def __post_init__(self) -> None:
        self.student = self.task.student_blocks
        self.teacher = self.task.teacher_blocks
        self.trained = {name: p for name, p in self.task.student.named_parameters() if p.requires_grad}
        self.optimizer = self.settings.optimizer(self.trained)
        self.rates = self.settings.schedules.rates(self.optimizer)
        self.average = MovingAverage(self.task, range(len(self.task.teacher_blocks))) if isinstance(self.task, Momentum) else None
        averaged = [mine for mine, _ in self.average.pairs] if self.average else []
        self.student_weights = PreviousWeights(list(self.trained.values()), self.student_staleness)
        self.teacher_weights = PreviousWeights(averaged, self.staleness)

    def train(
        self,
        batches: Iterable[Batch],
        *,
        before_update: Callable[[int, Batch, dict[str, float]], None],
        after_update: Callable[[int, Batch], None],
    ) -> None:
        """Train on all batches. `before_update` gets the step, its batch and the parts of its loss."""
        if isinstance(self.task.loss, nn.Module):
            self.task.loss.to(self.device)
        self.student.in_mode(train=False)
        self.student.in_mode(train=True)  # anew: some layers may stay in eval mode
        self.student.model.zero_grad(set_to_none=True)
        for step, batch in enumerate(batches, self.first_step):
            losses = self.accumulate_gradients(step, batch)
            before_update(step, batch, losses)
            self._update(step)
            after_update(step, batch)

    def evaluate(self, batches: Iterable[Batch], add: Callable[[Any, Any, int], None]) -> None:
        """Call `add(output, targets, rows)` for each microbatch of a validation, in eval mode and without gradients."""
        self.student.in_mode(train=False)
        with torch.no_grad():
            for step, batch in enumerate(batches):
                for number, rows in split_batch(batch, self.num_microbatches):
                    inputs, targets = self._rows(batch.inputs, rows), self._rows(batch.targets, rows)
                    output = self._forward(self.student, Role.STUDENT, inputs, step, number)
                    add(output, targets, rows.stop - rows.start)
        self.student.in_mode(train=True)

    # -- gradients of one batch -------------------------------------------------------------------------------------

    def accumulate_gradients(self, step: int, batch: Batch) -> dict[str, float]:
        """Add up the gradients of one batch; return the parts of its loss."""
        losses: dict[str, float] = {}
        for number, group in enumerate(self._groups(batch)):
            outputs: dict[Role, dict[int, Any]] = {Role.TEACHER: {}, Role.STUDENT: {}}
            for microbatch in group:  # 1.
                views = range(self.task.demands.views)
                inputs = [self._rows(view(self.task, batch.inputs, v), microbatch.rows) for v in views]
                outputs[Role.TEACHER] |= self._teacher_outputs(step, microbatch, inputs)
                outputs[Role.STUDENT] |= self._student_outputs(step, microbatch, inputs)
            rows = slice(group[0].rows.start, group[-1].rows.stop)
            factors = batch.factors(self.contracts.loss_parts, rows.stop - rows.start)
            parts = self._backward(step, number, outputs, self._rows(batch.targets, rows), factors)  # 2. and 3.
            for (name, part), factor in zip(parts.items(), factors, strict=True):
                losses[name] = losses.get(name, 0.0) + float(part.detach().double()) * factor
        for model in (self.student, self.teacher):  # 4.
            if model is not None:
                self.settings.norms.end_batch(model.model.modules())
        return losses

    def _groups(self, batch: Batch) -> list[list[Microbatch]]:
        """The microbatches of a batch, in groups that share one loss."""
        microbatches = split_batch(batch, self.num_microbatches)
        return [microbatches] if self.task.demands.batch_loss else [[microbatch] for microbatch in microbatches]

    def _rows(self, value: Any, rows: slice) -> Any:
        return to_device(rows_of(value, rows), self.device)

    def _teacher_outputs(self, step: int, microbatch: Microbatch, inputs: list[Any]) -> dict[int, Any]:
        """The teacher's output of each unit of a microbatch; none without a teacher."""
        if self.teacher is None:
            return {}
        self.teacher.in_mode(teacher_trains(self.task))
        seen = self.task.demands.teacher_views
        with torch.no_grad(), self.teacher_weights.for_reading():
            return {
                unit: self._forward(self.teacher, Role.TEACHER, inputs[unit % seen], step, unit)
                for unit in range(microbatch.number * seen, (microbatch.number + 1) * seen)
            }

    def _student_outputs(self, step: int, microbatch: Microbatch, inputs: list[Any]) -> dict[int, Any]:
        """The student's output of each unit of a microbatch. A student that writes to its input in place gets a copy."""
        views, writes = self.task.demands.views, 0 in self.contracts.copies
        with self.student_weights.for_reading():
            return {
                unit: self._forward(
                    self.student, Role.STUDENT, copied(inputs[unit % views]) if writes else inputs[unit % views], step, unit
                )
                for unit in range(microbatch.number * views, (microbatch.number + 1) * views)
            }

    def _forward(self, model: BlockModel, role: Role, inputs: Any, step: int, unit: int) -> Any:
        return run_blocks(model, range(len(model)), inputs, self.settings.seed, role, step, unit, self.device)

    def _backward(
        self, step: int, number: int, outputs: Mapping[Role, Mapping[int, Any]], targets: Any, factors: Sequence[float]
    ) -> dict[str, Tensor]:
        """Evaluate the loss with this number in its step, and run its backward; return its parts.

        The loss has a graph of its own, which starts at the student's outputs. So its backward is over before the student's
        begin, one output after the other, as in a pipeline; a single backward would add up gradients in another order.
        """
        seed_block(self.settings.seed, Role.STUDENT, len(self.student), step, number, self.device)
        starts = {unit: detached(output) for unit, output in outputs[Role.STUDENT].items()}
        student_outputs = {unit: start.value for unit, start in starts.items()}
        with at_step(step):
            parts = evaluate_loss(self.task, student_outputs, outputs[Role.TEACHER], targets)
            weighted_loss(parts, factors).backward()
        for start in starts.values():
            used = [(t, g) for t, g in zip(start.tracked, start.gradients, strict=True) if g is not None]
            with self.student_weights.for_reading():
                torch.autograd.backward([tensor for tensor, _ in used], [gradient for _, gradient in used])
        return parts

    # -- the update -------------------------------------------------------------------------------------------------

    def _update(self, step: int) -> None:
        """Update the student from its gradients, then a momentum teacher from the student."""
        if self.settings.largest_norm is not None:  # 5.
            parameters = [p for p in self.student.model.parameters() if p.requires_grad]
            clip(list(self.trained.values()), gradient_squares(parameters), self.settings.largest_norm)
        self.rates.set(step)
        with self.student_weights.updated():  # 6.
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.note()
            with self.teacher_weights.updated():  # 7.
                self.average.move(step)


class PreviousWeights:
    """Weights as they were one update before, for steps that read stale ones. With a staleness of 0 nothing is kept.

    Before the first update, the previous weights are the first ones.
    """

    def __init__(self, weights: list[Tensor], staleness: int) -> None:
        self.weights = weights if staleness else []
        self.previous = [tensor.detach().clone() for tensor in self.weights]

    @contextmanager
    def for_reading(self) -> Iterator[None]:
        """Have the previous weights in place of the newest ones in the body."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, tensor in enumerate(self.weights):
            self.previous[i], tensor.data = tensor.data, self.previous[i]

    @contextmanager
    def updated(self) -> Iterator[None]:
        """Snapshot the weights before the body updates them; the snapshot becomes the previous version."""
        snapshot = [tensor.detach().clone() for tensor in self.weights]
        yield
        self.previous = snapshot
