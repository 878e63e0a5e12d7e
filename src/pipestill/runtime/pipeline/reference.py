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
      |     feature losses of student blocks, each part likewise                      -> gradients of the blocks' outputs
      |  3. for each student output, in the same order: its backward; the gradient
      |     of a compared block's output is that from behind plus that of its losses  -> gradients of weights, which add up
      v
      4. deferred batch norm moves its running statistics
      5. clip the gradients by their global norm, if asked to
      6. optimizer step at the learning rates and weight decays of step k             -> student version k + 1
      7. momentum only: teacher = m_k * teacher + (1 - m_k) * student                 -> teacher version k + 1

The factor of a part is (rows of the group) / B, for parts are means over rows. Where the loss counts a part (`Batch.counts`), the
part is a sum over what counts, and its factor 1 / the batch's count, or 0 where that is 0.

A weight that several blocks have (tied embeddings) has a gradient for each of them, and these are added up in the order of the
blocks before 5.

Step k reads version k of all weights. With a staleness of 1 it reads version k - 1 (and step 0 version 0). A unit is one
microbatch in one view: unit u of a model that sees V views is view u % V of microbatch u // V. Random numbers of a block follow
from (seed, model, block, step, unit), so they do not depend on what ran before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipestill.losses.step import at_step
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import Detached, detached, with_exit
from pipestill.model.nests import copied, rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.seeding import seed_block
from pipestill.model.tasks import Momentum, Task, teacher_trains, view
from pipestill.runtime.batch import Batch, Microbatch, split_batch
from pipestill.runtime.pipeline.features import Taught, cut_after, feature_losses, place_losses, teach, trained_beside
from pipestill.runtime.pipeline.losses import backward, evaluate_loss, weighted_loss
from pipestill.runtime.pipeline.stage import clip, gradient_squares, run_blocks
from pipestill.runtime.pipeline.ties import TiedWeights
from pipestill.runtime.pipeline.weights import MovingAverage
from pipestill.runtime.settings import PipelineSettings
from pipestill.schedule import Role


class StudentForward(NamedTuple):
    """One forward of the student."""

    ends: list[Detached]
    """For each piece: its output as the start of what comes behind, which is the loss behind the last one."""
    exits: dict[int, Detached]
    """By block that feature losses compare: its output as the start of their graph."""


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
        every_block = range(len(self.student))
        weights = {name: p for name, p in self.task.student.named_parameters() if p.requires_grad}
        self.trained = {**weights, **trained_beside(self.task, every_block)}
        self.ties = TiedWeights(self.student, every_block)
        self.pieces = cut_after(every_block, self.task.feature_losses.student_blocks)
        """The student's blocks; a new graph begins after each that feature losses compare."""
        self.optimizer = self.settings.optimizer(self.trained)
        self.rates = self.settings.schedules.rates(self.optimizer)
        self.average = MovingAverage(self.task, range(len(self.task.teacher_blocks))) if isinstance(self.task, Momentum) else None
        averaged = [mine for mine, _ in self.average.pairs] if self.average else []
        self.student_weights = PreviousWeights(list(weights.values()), self.student_staleness)
        self.teacher_weights = PreviousWeights(averaged, self.staleness)

    def train(
        self,
        batches: Iterable[Batch],
        *,
        before_update: Callable[[int, Batch, dict[str, float]], None],
        after_update: Callable[[int, Batch], None],
    ) -> None:
        """Train on all batches. `before_update` gets the step, its batch and the parts of its loss."""
        place_losses(self.task, range(len(self.student)), self.device)
        self.student.in_mode(train=False)
        self.student.in_mode(train=True)  # anew: some layers may stay in eval mode
        self.student.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
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
            taught: dict[int, Taught] = {}
            forwards: dict[int, StudentForward] = {}
            for microbatch in group:  # 1.
                views = range(self.task.demands.views)
                inputs = [self._rows(view(self.task, batch.inputs, v), microbatch.rows) for v in views]
                taught |= self._teacher_forwards(step, microbatch, inputs)
                forwards |= self._student_forwards(step, microbatch, inputs)
            rows = slice(group[0].rows.start, group[-1].rows.stop)
            targets, factors = self._rows(batch.targets, rows), partial(batch.factors, rows=rows.stop - rows.start)
            parts = self._losses(step, number, forwards, taught, targets, factors)  # 2.
            for name, part in parts.items():
                losses[name] = losses.get(name, 0.0) + float(part)
            self._backward(forwards)  # 3.
        self.ties.add_up({range(len(self.student)): self.ties.gradients()})
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

    def _teacher_forwards(self, step: int, microbatch: Microbatch, inputs: list[Any]) -> dict[int, Taught]:
        """The teacher's forward of each unit of a microbatch; none without a teacher."""
        if self.teacher is None:
            return {}

        teacher, losses = self.teacher, self.task.feature_losses
        every_block = range(len(teacher))

        def run(unit: int, blocks: range, value: Any) -> Any:
            return self._forward(teacher, Role.TEACHER, value, step, unit, blocks)

        self.teacher.in_mode(teacher_trains(self.task))
        seen = self.task.demands.teacher_views
        with torch.no_grad(), self.teacher_weights.for_reading():
            return {
                unit: teach(losses, self.contracts, every_block, inputs[unit % seen], partial(run, unit))
                for unit in range(microbatch.number * seen, (microbatch.number + 1) * seen)
            }

    def _student_forwards(self, step: int, microbatch: Microbatch, inputs: list[Any]) -> dict[int, StudentForward]:
        """The student's forward of each unit of a microbatch. A student that writes to its input in place gets a copy."""
        views, writes = self.task.demands.views, 0 in self.contracts.copies
        with self.student_weights.for_reading():
            return {
                unit: self._student_forward(copied(inputs[unit % views]) if writes else inputs[unit % views], step, unit)
                for unit in range(microbatch.number * views, (microbatch.number + 1) * views)
            }

    def _student_forward(self, value: Any, step: int, unit: int) -> StudentForward:
        """Run the student, in a graph for each of its pieces."""
        forward = StudentForward([], {})
        for blocks in self.pieces:
            output = self._forward(self.student, Role.STUDENT, value, step, unit, blocks)
            last = blocks[-1]
            if last in self.task.feature_losses.student_blocks:
                forward.exits[last] = detached(output, copies=last + 1 in self.contracts.copies)
            forward.ends.append(detached(output))
            value = forward.ends[-1].value
        return forward

    def _forward(self, model: BlockModel, role: Role, value: Any, step: int, unit: int, blocks: range | None = None) -> Any:
        blocks = range(len(model)) if blocks is None else blocks
        ties = self.ties if role is Role.STUDENT else None
        return run_blocks(model, blocks, value, self.settings.seed, role, step, unit, self.device, ties)

    def _losses(
        self, step: int, number: int, forwards: Mapping[int, StudentForward], taught: Mapping[int, Taught], targets: Any,
        factors: Callable[[Sequence[str]], Sequence[float]],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Evaluate the losses with this number in their step, and run their backwards; return their parts times their factors.

        Each loss has a graph of its own, which starts at the student's outputs, or at those of a block. So its backward is over
        before the student's begin, as in a pipeline; a single backward would add up gradients in another order.
        """
        seed_block(self.settings.seed, Role.STUDENT, len(self.student), step, number, self.device)
        outputs = {unit: forward.ends[-1].value for unit, forward in forwards.items()}
        with at_step(step), self.ties.of(len(self.student) - 1):  # a loss may apply the last block's head
            parts = evaluate_loss(self.task, outputs, {unit: of.output for unit, of in taught.items()}, targets)
            by = factors(tuple(parts))
            backward(weighted_loss(parts, by))
        found = {name: part.detach().double() * factor for (name, part), factor in zip(parts.items(), by, strict=True)}
        losses, taken = self.task.feature_losses, [of.taken for of in taught.values()]
        for block in losses.student_blocks:
            seed_block(self.settings.seed, Role.STUDENT, len(self.student) + 1 + block, step, number, self.device)
            exits = [forward.exits[block] for forward in forwards.values()]
            found |= feature_losses(losses, block, exits, taken, targets, step, factors)
        return found

    def _backward(self, forwards: Mapping[int, StudentForward]) -> None:
        """Run the student's backwards, one output after the other, from the last piece to the first."""
        for forward in forwards.values():
            for blocks, end in zip(reversed(self.pieces), reversed(forward.ends), strict=True):
                roots = with_exit(zip(end.tracked, end.gradients, strict=True), forward.exits.get(blocks[-1]))
                with self.student_weights.for_reading():
                    torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])

    # -- the update -------------------------------------------------------------------------------------------------

    def _update(self, step: int) -> None:
        """Update the student from its gradients, then a momentum teacher from the student."""
        if self.settings.largest_norm is not None:  # 5.
            clip(list(self.trained.values()), gradient_squares(self.trained.values()), self.settings.largest_norm)
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
