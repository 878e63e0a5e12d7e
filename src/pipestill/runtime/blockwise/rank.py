"""One rank of a blockwise run: its phases in order, and what it reports of them.

Beside it are the groups of ranks that share batches, and the reference: a plain loop on one device that trains one block after
the other, each over all of the data.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from pipestill.model.blockwise.task import Blockwise, BlockwiseContracts
from pipestill.model.nests import to_device
from pipestill.plan.blockwise.plan import BlockwisePlan, Phase
from pipestill.runtime.batch import Batch, Window, windows
from pipestill.runtime.blockwise.executor import BlockwiseExecutor
from pipestill.runtime.blockwise.worker import BlockwiseWorker
from pipestill.runtime.pipeline.stage import move
from pipestill.runtime.record import Recorder
from pipestill.runtime.reports import LogClock, RunListener, StepReports, check_finite_blocks, logged_blocks
from pipestill.runtime.settings import TrainingSettings
from pipestill.runtime.transport.protocol import Waiting, World
from pipestill.runtime.world import OneProcess
from pipestill.schedule import Event, Lane, Op, Role
from pipestill.schedule.comms import edges

Groups = dict[tuple[int, ...], dist.ProcessGroup]


def plan_edges(plan: BlockwisePlan) -> set[tuple[int, int, Lane]]:
    """Every directed edge and lane of all phases of a plan, between ranks as the world counts them."""
    return {
        (phase.ranks[source], phase.ranks[destination], lane)
        for phase in plan.phases
        for source, destination, lane in edges(phase.schedule.structure)
    }


def process_groups(plans: Iterable[BlockwisePlan]) -> Groups:
    """A process group for every set of ranks that share batches of a block, made on all ranks in the same order."""
    shared = set[tuple[int, ...]]()
    for phase in (phase for plan in plans for phase in plan.phases):
        structure = phase.schedule.structure
        for action in structure.actions():
            if action.op is Op.REDUCE:
                shared.add(tuple(phase.ranks[structure.rank_of(a)] for a in structure.sharers(action)))
    return {ranks: dist.new_group(list(ranks)) for ranks in sorted(shared)}


@dataclass(eq=False)
class BlockwiseRank:
    """Everything that one rank of a blockwise run holds and does.

    `read` opens the data anew; only a phase's first rank calls it. `listener` is None on all ranks but 0. Phases of single
    ranks are tasks that a rank with none of its own left takes from others: from the rank that was to have most left, its
    last task first. `run_name` tells this run's tasks from those of others.
    """

    plan: BlockwisePlan
    rank: int
    task: Blockwise
    contracts: BlockwiseContracts
    settings: TrainingSettings
    device: torch.device
    world: World
    groups: Groups | None
    read: Callable[[], Iterator[Batch]]
    listener: RunListener | None
    run_name: str

    def __post_init__(self) -> None:
        self.worker = BlockwiseWorker(
            self.task, self.contracts, device=self.device, seed=self.settings.seed, optimizer=self.settings.optimizer,
            schedules=self.settings.schedules, apart=isinstance(self.world, OneProcess) and self.world.num_ranks > 1,
        )  # fmt: skip
        self.transport = self.world.transport(self.rank, plan_edges(self.plan), self.settings.timeout_seconds)
        self.events: dict[int, list[Event]] = {}
        """By the number of each phase that this rank took part in: what ran when."""
        self.losses: dict[int, float] = {}
        """By block: the mean loss of its last logged batches. On the first rank of its phase."""
        self.batches = 0  # of the last phase
        self.samples = 0

    def run(self) -> Waiting:
        """Run all phases that this rank takes part in."""
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
        """Train the blocks of one phase over all of the data."""
        local, structure = phase.ranks.index(self.rank), phase.schedule.structure
        trained = structure.stages_of(local, Role.STUDENT)
        self.worker.hold(structure.stages_of(local, Role.TEACHER), trained)
        self.phase = phase
        self.recorder = Recorder(local, self.worker.device)
        self.reports = StepReports(self.transport, self.rank, phase.ranks, self.recorder, segment=number)
        self.batches = 0
        self.samples = 0
        executor = BlockwiseExecutor(
            phase.schedule, local, ranks=phase.ranks, worker=self.worker, contracts=self.contracts,
            transport=self.transport, recorder=self.recorder,
            source=windows(self.read(), structure.window) if local == 0 else None,
            groups=self.groups, after_step=self._after_step, segment=number,
        )  # fmt: skip
        yield from executor.run()
        yield from self._report()
        self.events[number] = self.recorder.events()
        self.worker.release(trained)

    def _after_step(self, step: int, window: Window) -> Waiting:
        done, every = window.first + window.num_batches, self.settings.log_every
        self.batches = done
        self.samples += sum(window.rows)
        self.reports.clock.count(sum(window.rows), window.num_batches)
        if done // every == window.first // every and not window.last:
            return
        yield from self._report()
        lap = self.reports.clock.lap()
        losses = (self.worker.loss_sums / lap.steps).tolist()
        self.worker.loss_sums.zero_()
        check_finite_blocks(dict(enumerate(losses)), done - 1)
        sizes = [len(losses)] * len(self.phase.ranks)
        self.reports.give(step, done - 1, window.epoch, lap, losses, sizes)

    def _report(self) -> Waiting:
        """Report the batches that were logged last, unless that was done before."""
        logged = yield from self.reports.collect()
        if logged is None:
            return
        losses = sum(logged.figures[1:], logged.figures[0]).tolist()
        mine = {block: losses[block] for block in self.phase.blocks}
        self.losses |= mine
        if self.listener is not None:
            lr = self.settings.schedules.lr_at(logged.step)
            self.listener.step(logged_blocks(logged.step, logged.epoch, mine, lr=lr, **logged.times))


@dataclass(frozen=True)
class BlocksTrained:
    """What a blockwise reference has done: each block's mean loss over its last logged batches, and what it read."""

    losses: list[float]
    batches: int
    samples: int


def blockwise_reference(
    task: Blockwise,
    contracts: BlockwiseContracts,
    read: Callable[[], Iterator[Batch]],
    *,
    settings: TrainingSettings,
    device: torch.device,
    listener: RunListener,
) -> BlocksTrained:
    """Train every block of `task` to its end before the next; no schedule at all. `read` opens the data anew."""
    worker = BlockwiseWorker(
        task, contracts, device=device, seed=settings.seed, optimizer=settings.optimizer, schedules=settings.schedules
    )
    worker.hold(range(task.num_blocks), ())
    losses, batches, samples = [math.nan] * task.num_blocks, 0, 0
    for block in range(task.num_blocks):
        worker.hold((), [block])
        batches = samples = 0
        clock = LogClock()
        for number, batch in enumerate(read()):
            value = to_device(batch.inputs, device)
            for before in range(block):
                value = worker.teacher_output(before, value)
            worker.train(block, value, worker.teacher_output(block, value), 1.0, number, 0, None)
            worker.update(block, number)
            batches, samples = batches + 1, samples + batch.rows
            clock.count(batch.rows)
            if batches % settings.log_every == 0 or batch.last:
                lap = clock.lap()
                losses[block] = float(worker.loss_sums[block]) / lap.steps
                worker.loss_sums.zero_()
                check_finite_blocks({block: losses[block]}, number)
                lr = settings.schedules.lr_at(number)
                times = lap.values(bubble=0.0)
                listener.step(logged_blocks(number, batch.epoch, {block: losses[block]}, lr=lr, **times))
        worker.release([block])
    move(task.teacher_blocks, range(task.num_blocks), torch.device("cpu"))
    return BlocksTrained(losses, batches, samples)
