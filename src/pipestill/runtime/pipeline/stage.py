"""A stage: consecutive blocks of one role that one rank runs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import DeviceError, ModelError
from pipestill.losses.step import at_step
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import Detached, SplitBlock, detached, start_graph, start_of, with_exit
from pipestill.model.contracts import Contract
from pipestill.model.nests import watched
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.seeding import seed_block
from pipestill.model.tasks import Momentum, Task, teacher_trains
from pipestill.model.trials import refuse_single_row
from pipestill.runtime.pipeline.features import Piece, Taught, cut_after, feature_losses, place_losses, teach, trained_beside
from pipestill.runtime.pipeline.losses import backward, evaluate_loss, weighted_loss
from pipestill.runtime.pipeline.ties import TiedWeights
from pipestill.runtime.pipeline.weights import MovingAverage, Trained, Versions
from pipestill.runtime.settings import PipelineSettings
from pipestill.schedule import Role


def run_blocks(
    model: BlockModel, blocks: range, value: Any, seed: int, role: Role, step: int, unit: int, device: torch.device,
    ties: TiedWeights | None = None,
) -> Any:  # fmt: skip
    """The value after `blocks`, each with its own random numbers (see `seed_block`) and its own leaves of tied weights."""

    running = blocks.start

    def before(block: int) -> None:
        nonlocal running
        running = block
        seed_block(seed, role, block, step, unit, device)
        if ties is not None:
            ties.enter(block)

    try:
        return model.run(blocks, value, before)
    except ValueError as error:
        refuse_single_row(error, f"{role.name.lower()} block {running} ('{model.blocks[running].name}')", step)
        raise
    finally:
        if ties is not None:
            ties.leave()


def guard_batch(value: Any) -> Callable[[str], None]:
    """A check that nobody wrote to the tensors of a batch, which both models read: call it after a forward."""
    changed = watched(value)

    def unchanged(who: str) -> None:
        if changed():
            raise ModelError(f"the first block of the {who} changes its input in place, and the other model reads it too")

    return unchanged


@dataclass(eq=False)
class TeacherStage:
    """A stage of the teacher: runs forward without gradients. A momentum teacher's weights then follow the student's."""

    task: Task
    contracts: PipelineContracts
    blocks: range
    device: torch.device
    settings: PipelineSettings

    def __post_init__(self) -> None:
        assert self.task.teacher_blocks is not None
        self.model = self.task.teacher_blocks
        self.train = teacher_trains(self.task)
        move(self.model, self.blocks, self.device)
        self.model.in_mode(train=self.train)
        self.average = MovingAverage(self.task, self.blocks) if isinstance(self.task, Momentum) else None

    def forward(self, value: Any, step: int, unit: int) -> Taught:
        """Run the stage forward."""
        self.model.in_mode(train=self.train)

        def run(blocks: range, value: Any) -> Any:
            return run_blocks(self.model, blocks, value, self.settings.seed, Role.TEACHER, step, unit, self.device)

        with torch.no_grad():
            return teach(self.task.feature_losses, self.contracts, self.blocks, value, run)

    def end_batch(self) -> None:
        """Move deferred batch norm statistics, after all forwards of a batch."""
        self.settings.norms.end_batch(self.model.modules_of(self.blocks))

    def note(self) -> None:
        """Take note that the student has just been updated: a later `follow` copies its buffers as they are now."""
        if self.average is not None:
            self.average.note()

    def follow(self, step: int) -> None:
        """Move the weights towards the student's, after its update of `step`."""
        assert self.average is not None
        self.average.move(step)


@dataclass
class _Held:
    """What a stage keeps of a unit between its forward and its backward."""

    input_gradients: list[Tensor | None]
    """Filled by the backward."""
    outputs: list[Tensor]
    """Those that travel to the next stage."""
    pieces: list[Piece]
    """In their order."""


@dataclass(eq=False)
class StudentStage:
    """A stage of the student: runs forward and backward, accumulates gradients, and updates its weights.

    Steps read weights that are `staleness` updates old. With `halves`, backwards come in two.
    """

    task: Task
    contracts: PipelineContracts
    blocks: range
    device: torch.device
    settings: PipelineSettings
    halves: bool = False
    staleness: int = 0

    def __post_init__(self) -> None:
        self.model = self.task.student_blocks
        of_blocks = [self.model.parameters_of(range(i, i + 1)) for i in self.blocks]
        tied = sum(map(len, of_blocks)) > len(self.model.parameters_of(self.blocks))
        self.split = self.halves and not tied  # gradients of a weight of two blocks add up inside one backward
        parts = zip(self.task.feature_losses.student_blocks, self.contracts.feature_parts, strict=True)
        self.compared = {block: names for block, names in parts if block in self.blocks}
        """The stage's blocks that feature losses compare, each with the names of the losses' parts."""
        self.pieces = cut_after(self.blocks, self.blocks if self.split else self.compared)
        move(self.model, self.blocks, self.device)
        self.ties = TiedWeights(self.model, self.blocks)
        weights = {n: p for n, p in self.model.parameters_of(self.blocks).items() if p.requires_grad}
        weights |= self.ties.weights
        self.parameters = {**weights, **trained_beside(self.task, self.blocks)}
        self.counted = [p for name, p in self.parameters.items() if name not in self.ties.counted_elsewhere]
        """The parameters whose gradients count in the norm of all gradients here: each counts in one stage."""
        self.trained = Trained(self.parameters, self.settings.optimizer, self.settings.schedules)
        self.versions = Versions(list(weights.values()), self.staleness)
        self.stash: dict[tuple[int, int], _Held] = {}
        """By step and unit."""
        self.from_loss: dict[tuple[int, int], Detached] = {}
        """By step and unit: the output, and its gradients from the loss."""
        own = self.contracts.loss_parts if self.blocks.stop == len(self.model) else ()
        self.parts = (*own, *(name for names in self.compared.values() for name in names))
        """The names of the parts of the loss that this stage evaluates."""
        self.loss_sums = torch.zeros(len(self.parts), dtype=torch.float64, device=self.device)
        place_losses(self.task, self.blocks, self.device)

    def _contract(self, unit: int, block: int, length: int | None = None) -> Contract:
        """The contract of the boundary after a block, with the sizes of one length, or as it is at any."""
        contracts = self.contracts if length is None else self.contracts.at(length)
        return contracts.student[unit % self.task.demands.views][block]

    def _run(self, blocks: range, value: Any, step: int, unit: int) -> Any:
        return run_blocks(self.model, blocks, value, self.settings.seed, Role.STUDENT, step, unit, self.device, self.ties)

    def enter(self, tensors: Sequence[Tensor], rows: int, unit: int, length: int) -> tuple[Any, list[Tensor | None]]:
        """Start a graph at received tensors. Returns the first block's input, and a list that the backward fills."""
        contract = self._contract(unit, self.blocks[0] - 1, length)
        entered, gradients = start_graph([tensors[i] for i in contract.tracked_positions])
        given = list(tensors)
        for i, tensor in zip(contract.tracked_positions, entered, strict=True):
            given[i] = tensor
        return contract.join(given, rows), gradients

    def forward(self, value: Any, gradients: list[Tensor | None], step: int, unit: int, rows: int, length: int) -> Any:
        """Run the stage forward, and keep its graph for `backward`. `gradients` is the list that `enter` gave."""
        self.model.in_mode(train=True)
        with self.versions.of(step):
            output, pieces = self._forward_in_pieces(value, step, unit)
        contract = self._contract(unit, self.blocks[-1], length)
        self.stash[step, unit] = _Held(gradients, contract.split(output, rows), pieces)
        return output

    def _forward_in_pieces(self, value: Any, step: int, unit: int) -> tuple[Any, list[Piece]]:
        """Run the blocks, each piece of them with a graph of its own."""
        pieces, output = [], value
        for blocks in self.pieces:
            last = blocks[-1]
            halves = SplitBlock(start_of(value)) if self.split and last not in self.contracts.unsplit else None
            output = self._run(blocks, value, step, unit)
            exit = detached(output, copies=last + 1 in self.contracts.copies) if last in self.compared else None
            if last == self.blocks[-1]:
                pieces.append(Piece(halves, exit=exit))
            else:
                value, tracked, gradients = detached(output)
                pieces.append(Piece(halves, tracked, gradients, exit))
        return output, pieces

    def end_batch(self) -> None:
        """Move deferred batch norm statistics, after all forwards of a batch."""
        self.settings.norms.end_batch(self.model.modules_of(self.blocks))

    def infer(self, value: Any, step: int, unit: int) -> Any:
        """Run the stage forward for a validation: no gradients, nothing kept."""
        self.model.in_mode(train=False)
        with torch.no_grad():
            return self._run(self.blocks, value, step, unit)

    def loss(
        self, number: int, outputs: Mapping[int, Any], teacher: Mapping[int, Any], target: Any, step: int,
        factors: Sequence[float],
    ) -> None:  # fmt: skip
        """Evaluate the loss with a number in its step, of both models' outputs by unit, and keep their gradients.

        `factors` holds that of each part of the loss (see `Batch.factors`).
        """
        seed_block(self.settings.seed, Role.STUDENT, len(self.model), step, number, self.device)
        starts = {unit: detached(output) for unit, output in outputs.items()}
        given = {unit: start.value for unit, start in starts.items()}
        with at_step(step), self.ties.of(len(self.model) - 1):  # a loss may apply the last block's head
            parts = evaluate_loss(self.task, given, teacher, target)
        if tuple(parts) != self.contracts.loss_parts:
            raise ModelError(
                f"the loss had the parts {', '.join(self.contracts.loss_parts)} on the sample batch and now has "
                f"{', '.join(parts)}; it must always give the same ones, in the same order"
            )
        self._add_losses({name: part.detach().double() * by for (name, part), by in zip(parts.items(), factors, strict=True)})
        with at_step(step):  # a loss may recompute what it needs
            backward(weighted_loss(parts, factors))
        self.from_loss |= {(step, unit): start for unit, start in starts.items()}

    def feature_losses(
        self, number: int, units: Sequence[int], taught: Sequence[Mapping[int, Tensor]], target: Any, step: int,
        factors: Callable[[Sequence[str]], Sequence[float]],
    ) -> None:  # fmt: skip
        """Evaluate the feature losses with a number in their step, and keep the gradients of the blocks' outputs.

        `taught` holds the teacher's tensors of each of the `units`. `factors` gives those of parts (see `Batch.factors`).
        """
        for block in self.compared:
            place = next(i for i, blocks in enumerate(self.pieces) if blocks[-1] == block)
            exits = [exit for unit in units if (exit := self.stash[step, unit].pieces[place].exit) is not None]
            seed_block(self.settings.seed, Role.STUDENT, len(self.model) + 1 + block, step, number, self.device)
            self._add_losses(feature_losses(self.task.feature_losses, block, exits, taught, target, step, factors))
            for unit, exit in zip(units, exits, strict=True):
                self.stash[step, unit].pieces[place].exit = exit._replace(value=None)  # its gradients are all that is needed

    def _add_losses(self, parts: Mapping[str, Tensor]) -> None:
        """Add parts of the loss to the sums of the batch."""
        places = [self.parts.index(name) for name in parts]
        self.loss_sums[places] += torch.stack(list(parts.values()))

    def take_losses(self) -> dict[str, float]:
        """The parts of the batch's loss, once all its microbatches are through; starts the next sum."""
        sums, self.loss_sums = self.loss_sums, torch.zeros_like(self.loss_sums)
        return dict(zip(self.parts, sums.tolist(), strict=True))

    def backward(self, gradients: Sequence[Tensor] | None, step: int, unit: int) -> list[Tensor]:
        """Accumulate the weights' gradients; returns those of the input leaves. `gradients` None: from the loss.

        Where backwards come in halves, this is the first, and the gradients of weights that can wait are left to
        `weight_gradients`.
        """
        held = self.stash[step, unit] if self.halves else self.stash.pop((step, unit))
        pairs: Iterable[tuple[Tensor, Tensor | None]]
        if gradients is None:
            start = self.from_loss.pop((step, unit))
            pairs = zip(start.tracked, start.gradients, strict=True)
        else:
            positions = self._contract(unit, self.blocks[-1]).gradient_positions
            pairs = [(held.outputs[i], gradient) for i, gradient in zip(positions, gradients, strict=True)]
        pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
        with self.versions.of(step):
            for piece in reversed(held.pieces):
                if piece is not held.pieces[-1]:
                    pairs = zip(piece.tracked, piece.gradients, strict=True)
                roots = with_exit(pairs, piece.exit)
                if roots and piece.halves is None:
                    _whole(roots)
                elif roots and piece.halves is not None:
                    piece.halves.input_half(roots)
        sent = self._input_gradients(held.input_gradients, unit)
        held.input_gradients = []
        held.outputs = []  # what is kept for the second half is in the pieces
        held.pieces = [Piece(piece.halves) for piece in held.pieces]
        return sent

    def weight_gradients(self, step: int, unit: int) -> None:
        """The second half of a backward."""
        held = self.stash.pop((step, unit))
        with self.versions.of(step):
            for piece in reversed(held.pieces):
                if piece.halves is not None:
                    piece.halves.weight_half()

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

    def tied_gradients(self) -> list[Tensor]:
        """The gradients of weights that several blocks have, which `add_up_tied` needs of every stage with such blocks."""
        return self.ties.gradients()

    def add_up_tied(self, gradients: Mapping[range, Sequence[Tensor]]) -> None:
        """Add up the gradients of tied weights, given by the blocks of each stage; once a step, after all its backwards."""
        self.ties.add_up(gradients)

    def clip(self, squares: Tensor, largest: float) -> None:
        """Scale the gradients so that the norm of those of all stages, whose `squares` these are, is at most `largest`."""
        clip(list(self.parameters.values()), squares, largest)

    def update(self, step: int) -> None:
        """Make the optimizer's step, at the learning rates and weight decays of `step`."""
        with self.versions.next():
            self.trained.update(step)


def _whole(roots: list[tuple[Tensor, Tensor]]) -> None:
    torch.autograd.backward([output for output, _ in roots], [gradient for _, gradient in roots])


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
        place_losses(task, range(len(task.student_blocks)), there)

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
        p.new_zeros((), dtype=torch.float64) if p.grad is None else torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for p in parameters
    ]
    return torch.stack(squares).cpu() if squares else torch.zeros(0, dtype=torch.float64)
