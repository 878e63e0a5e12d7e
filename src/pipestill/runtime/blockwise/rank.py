"""One rank of a blockwise run: its phases in order, and what it tells of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.errors import TrainingError
from pipestill.model.blockwise.contracts import BlockwiseContracts
from pipestill.model.blockwise.task import Blockwise
from pipestill.plan.blockwise.plan import BlockwisePlan, Phase
from pipestill.runtime.batch import Batch
from pipestill.runtime.blockwise.executor import BlockwiseExecutor
from pipestill.runtime.blockwise.windows import Window, windows
from pipestill.runtime.blockwise.worker import BlockwiseWorker
from pipestill.runtime.pipeline.executor import Waiting
from pipestill.runtime.pipeline.rank import LogClock
from pipestill.runtime.pipeline.stage import OptimizerFactory
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.protocol import Message
from pipestill.runtime.world import OneProcess, World
from pipestill.schedule import Action, Event, Lane, Op, Role
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.comms import edges


class Listener(Protocol):
    """Hears of logged batches on rank 0."""

    def step(self, values: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class BlockwiseSettings:
    """What a run does besides its plan; the same on every rank."""

    seed: int
    log_every: int
    lr: float
    lr_factor: Callable[[int], float]
    timeout_seconds: float


class BlockwiseRank:
    """Everything that one rank holds and does. `read` opens the data anew; only a phase's first rank calls it.

    Phases of single ranks are tasks that a rank without any of its own left takes from others: from the one that was to
    have most left, its last one first. `run_name` tells this run's tasks from those of others.
    """

    def __init__(
        self,
        plan: BlockwisePlan,
        rank: int,
        task: Blockwise,
        contracts: BlockwiseContracts,
        *,
        settings: BlockwiseSettings,
        device: torch.device,
        optimizer: OptimizerFactory,
        world: World,
        groups: dict[tuple[int, ...], dist.ProcessGroup] | None,
        read: Callable[[], Iterator[Batch]],
        listeners: Sequence[Listener],
        run_name: str,
    ) -> None:
        self.plan, self.rank, self.task, self.contracts, self.settings = plan, rank, task, contracts, settings
        self.world, self.groups, self.read, self.listeners, self.run_name = world, groups, read, listeners, run_name
        self.worker = BlockwiseWorker(
            task, contracts, device=device, seed=settings.seed, optimizer=optimizer, lr_factor=settings.lr_factor,
            apart=isinstance(world, OneProcess) and world.num_ranks > 1,
        )  # fmt: skip
        self.events: dict[int, list[Event]] = {}
        self.losses: dict[int, float] = {}
        self.batches = self.samples = 0
        used = {edge for phase in plan.phases for edge in _edges(phase)}
        self.transport = world.transport(rank, used, settings.timeout_seconds)

    def run(self) -> Waiting:
        """All phases that this rank takes part in."""
        for number, phase in enumerate(self.plan.phases):
            if self.rank in phase.ranks and (len(phase.ranks) > 1 or self.world.claim(f"{self.run_name}-{number}")):
                yield from self._phase(number, phase)
        for number in self._others_tasks():
            if self.world.claim(f"{self.run_name}-{number}"):
                yield from self._phase(number, replace(self.plan.phases[number], ranks=(self.rank,)))

    def _others_tasks(self) -> list[int]:
        """Phases of other single ranks, in the order in which to take them over."""
        left: dict[int, float] = {}
        tasks = []
        for number, phase in reversed(list(enumerate(self.plan.phases))):
            if len(phase.ranks) == 1 and self.plan.num_devices > 1:
                (owner,) = phase.ranks
                tasks.append((left.get(owner, 0.0), number, owner))
                left[owner] = left.get(owner, 0.0) + self.plan.predictions[number].seconds_per_step
        tasks = [task for task in tasks if task[2] != self.rank]
        return [number for _, number, owner in sorted(tasks, key=lambda task: (task[0] - left[task[2]], task[1]))]

    def _phase(self, number: int, phase: Phase) -> Waiting:
        local, structure = phase.ranks.index(self.rank), phase.schedule.structure
        assert isinstance(structure, BlockwiseStructure)
        trained = structure.stages_of(local, Role.STUDENT)
        self.worker.hold(structure.stages_of(local, Role.TEACHER), trained)
        self.number, self.phase = number, phase
        self.recorder, self.clock = Recorder(local, self.worker.device), LogClock()
        self.untold: _Logged | None = None
        self.since, self.busy = 0, 0.0
        self.batches = self.samples = 0
        executor = BlockwiseExecutor(
            phase.schedule, local, ranks=phase.ranks, worker=self.worker, contracts=self.contracts,
            transport=self.transport, recorder=self.recorder,
            source=windows(self.read(), structure.window) if local == 0 else None,
            groups=self.groups, after_step=self._after_step, phase=number,
        )  # fmt: skip
        yield from executor.run()
        yield from self._tell()
        self.events[number] = self.recorder.events()
        self.worker.release(trained)

    def _after_step(self, step: int, window: Window) -> Waiting:
        done, every = window.first + window.num_batches, self.settings.log_every
        self.since += window.num_batches
        self.batches, self.samples = done, self.samples + sum(window.rows)
        self.clock.count(sum(window.rows))
        if done // every == window.first // every and not window.last:
            return
        yield from self._tell()
        losses = (self.worker.loss_sums / self.since).tolist()
        self.worker.loss_sums.zero_()
        check_finite_blocks(losses, done - 1)
        busy = self.recorder.busy_seconds - self.busy
        vector = torch.tensor([busy, *losses], dtype=torch.float64)
        if self.rank == self.phase.ranks[0]:
            seconds, _, rows = self.clock.lap()
            self.untold = _Logged(step, done - 1, window.epoch, vector, seconds, self.since, rows)
            for rank in self.phase.ranks[1:]:
                self.transport.post(self._message(step, rank), [torch.empty_like(vector)])
        else:
            self.transport.send(self._message(step, self.rank), [vector])
        self.since, self.busy = 0, self.recorder.busy_seconds

    def _message(self, step: int, rank: int) -> Message:
        action = Action(Role.STUDENT, rank, Op.UPDATE, None, step)
        return Message(Lane.REPORT, action, rank, self.phase.ranks[0], self.number)

    def _tell(self) -> Waiting:
        """Tell of the window that was logged last, if nobody has heard of it."""
        if self.untold is None:
            return
        logged, self.untold = self.untold, None
        total = logged.mine
        for rank in self.phase.ranks[1:]:
            message = self._message(logged.step, rank)
            while not self.transport.arrived(message):
                yield message
            total = total + self.transport.take(message)[0]
        busy, *losses = total.tolist()
        mine = {block: losses[block] for block in self.phase.blocks}
        self.losses |= mine
        values = logged_blocks(
            logged.batch, logged.epoch, mine, lr=self.settings.lr * self.settings.lr_factor(logged.batch),
            seconds=logged.seconds / logged.batches, samples_per_second=logged.rows / logged.seconds,
            bubble=max(0.0, 1.0 - busy / (logged.seconds * len(self.phase.ranks))),
        )  # fmt: skip
        for listener in self.listeners:
            listener.step(values)


@dataclass(frozen=True)
class _Logged:
    """What the first rank of a phase knows of logged batches before it has heard of the others."""

    step: int
    batch: int
    epoch: int
    mine: Tensor
    seconds: float
    batches: int
    rows: int


def logged_blocks(batch: int, epoch: int, losses: Mapping[int, float], **rest: float) -> dict[str, float]:
    """One line of metrics.jsonl: the sum of the blocks' losses, and each."""
    parts = {f"block_{block}": loss for block, loss in losses.items()}
    return {"step": batch + 1, "epoch": epoch + 1, "loss": math.fsum(losses.values()), **parts, **rest}


def check_finite_blocks(losses: Sequence[float], batch: int) -> None:
    """`TrainingError` when a block's loss is NaN or infinite."""
    wrong = [f"block {i}: {loss:g}" for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if wrong:
        raise TrainingError(
            f"the loss is not finite by batch {batch + 1} ({', '.join(wrong)}); lower the learning rate, or look at the data"
        )


def _edges(phase: Phase) -> set[tuple[int, int, Lane]]:
    """Every directed edge and lane of a phase, between ranks as the world counts them."""
    return {(phase.ranks[a], phase.ranks[b], on) for a, b, on in edges(phase.schedule.structure)}
