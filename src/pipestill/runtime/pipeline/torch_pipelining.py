"""The peer that our schedules are timed against: `torch.distributed.pipelining`, with the teacher run first."""

import time
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import chain, pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ConfigError, DataError, ModelError, PlanError
from pipestill.losses.step import at_step
from pipestill.model.blocks import BlockModel, ranges
from pipestill.model.contracts import Contract, TensorLeaf
from pipestill.model.nests import num_rows, rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.seeding import OwnGenerator, derive
from pipestill.model.tasks import Task
from pipestill.optim import OptimizerFactory
from pipestill.plan import Plan
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.losses import weighted_loss
from pipestill.runtime.pipeline.stage import guard_batch, move


def train_with_torch(
    task: Task,
    contracts: PipelineContracts,
    plan: Plan,
    batches: Iterable[tuple[Any, Any]],
    *,
    kind: Literal["1f1b", "gpipe"],
    optimizer: OptimizerFactory,
    seed: int,
    device: torch.device,
) -> list[float]:
    """Train this rank's stages as a user of PyTorch alone would; returns the wall-clock seconds of each step.

    Call it on every rank of the default process group, with the same `batches` of (inputs, targets); reading one is
    part of its step, so have them ready. A step runs the teacher through a forward-only `ScheduleGPipe`, the student
    through `Schedule1F1B` or `ScheduleGPipe`, then the stage's optimizer. Weights are trained in place, on `device`,
    each stage on its own rank; without dropout they equal those of `reference`. The first step also allocates buffers.

    PyTorch gets every advantage that its interface offers: the plan's own partition; static shapes, so no extra forward
    finds them; two schedules made once, so nothing switches between evaluation and training; the loss as its share of
    the batch's mean, so no gradient is scaled afterwards; no outputs merged; nothing logged or recorded.

    Raises `PlanError` for a plan that does not fit the group or the schedule, `ModelError` where a boundary is anything
    but one tensor, `DataError` for batches that differ in size or do not divide into the microbatches.
    """
    _check(contracts, plan, kind)
    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

    source = _apart(batches, seed)
    first = next(source, None)
    if first is None:
        return []
    rank, agreed = dist.get_rank(), num_rows(first[0], "batch 1")
    rows, is_last = agreed // plan.microbatches, rank == plan.num_devices - 1
    loss = _Loss(task, contracts.loss_parts, rows)
    blocks = ranges(plan.student_partition)[rank]
    module = _Blocks(task.student_blocks, blocks, [contracts.inputs, *contracts.student[0]], rows, contracts.copies)
    make = Schedule1F1B if kind == "1f1b" else ScheduleGPipe
    train = make(module.stage(plan, device), plan.microbatches, loss_fn=loss, scale_grads=False)
    task.student_blocks.model.train()
    teacher = None
    if task.teacher_blocks is not None:
        own = ranges(plan.teacher_partition)[rank]
        module = _Blocks(task.teacher_blocks, own, [contracts.inputs, *contracts.teacher[0]], rows)
        module.keep = loss.taught if is_last else None
        teacher = module.stage(plan, device)
        teach = ScheduleGPipe(teacher, plan.microbatches)
        task.teacher_blocks.model.eval()
    trained = {n: p for n, p in task.student_blocks.parameters_of(blocks).items() if p.requires_grad}
    stepper = optimizer(trained) if trained else None
    indices = torch.arange(plan.microbatches) if is_last else None
    torch.manual_seed(derive(seed, "torch", rank))
    dist.barrier()
    marks = [_now(device)]
    for number, (inputs, targets) in enumerate(chain([first], source), start=1):
        if (came := num_rows(inputs, f"batch {number}")) != agreed or came % plan.microbatches:
            sizes = f"batches of one size (the first has {agreed}) that divides into {plan.microbatches} microbatches"
            raise DataError(f"batch {number} has {came} rows, and torch's schedules need {sizes}; use drop_last=True")
        read = (to_device(inputs, device),) if rank == 0 else ()
        if is_last:
            loss.take(Batch(came, 0, False, None, to_device(targets, device), counts=task.loss_counts(targets)))
        unchanged = guard_batch(read if teacher else ())
        if teacher is not None:
            with torch.no_grad():
                teach.step(*read, return_outputs=False)
            teacher.clear_runtime_states()  # or what crossed its boundaries stays until its next step
        train.step(*read, target=indices, return_outputs=False)
        unchanged("teacher or the student")
        loss.taught.clear()
        if stepper is not None:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        marks.append(_now(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


class _Blocks(nn.Module):
    """One rank's blocks of a model as one module, for microbatches of `rows`.

    PyTorch sends a tensor as it lies in memory, so between ranks it is contiguous, its axes in memory order.
    """

    def __init__(
        self, model: BlockModel, blocks: range, edges: Sequence[Contract], rows: int, copies: Set[int] = frozenset()
    ) -> None:
        super().__init__()
        self.model = model
        self.blocks = blocks
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == len(model)
        (entry,), (exit,) = edges[blocks.start].tensor_leaves, edges[blocks.stop].tensor_leaves
        self.into_order, order = exit.value.order(rows), entry.value.order(rows)
        self.out_of_order = sorted(range(len(order)), key=order.__getitem__)
        self.examples = _example(entry, rows, not self.is_first), _example(exit, rows, not self.is_last)
        self.clones = not self.is_first and blocks.start in copies
        self.keep: list[Tensor] | None = None

    def stage(self, plan: Plan, device: torch.device) -> Any:
        """PyTorch's stage around it."""
        from torch.distributed.pipelining import PipelineStage

        move(self.model, self.blocks, device)
        return PipelineStage(self, dist.get_rank(), plan.num_devices, device, *self.examples)

    def forward(self, value: Tensor) -> Tensor:
        if not self.is_first:
            value = value.permute(self.out_of_order)
        if self.clones:
            value = value.clone()
        for i in self.blocks:
            value = self.model.blocks[i].call(value)
        if not self.is_last:
            value = value.permute(self.into_order).contiguous()
        if self.keep is not None:
            self.keep.append(value)
        return value


def _example(leaf: TensorLeaf, rows: int, crosses: bool) -> Tensor:
    """A tensor without storage that looks like what goes into a stage, or comes out of it."""
    shape, order = leaf.value.shape_of(rows), leaf.value.order(rows)
    shown = [shape[axis] for axis in order] if crosses else shape
    return torch.empty(shown, dtype=leaf.value.dtype, device="meta").requires_grad_(leaf.gradient is not None)


class _Loss:
    """The loss of the step under way. PyTorch passes it the index of a microbatch as the target."""

    def __init__(self, task: Task, parts: Sequence[str], rows: int) -> None:
        self.task = task
        self.parts = parts
        self.rows = rows
        """How many a microbatch has."""
        self.taught: list[Tensor] = []
        self.batch = Batch(0, 0, True)
        self.factors: list[float] = []
        self.step = -1

    def take(self, batch: Batch) -> None:
        """Go on to the next step, that of `batch`."""
        self.batch = batch
        self.factors = batch.factors(self.parts, self.rows)
        self.step += 1

    def __call__(self, output: Tensor, index: Tensor) -> Tensor:
        m = int(index)
        target = rows_of(self.batch.targets, slice(m * self.rows, (m + 1) * self.rows))
        with at_step(self.step):
            return weighted_loss(self.task.loss_parts([output], self.taught[m : m + 1], target), self.factors)


def _apart(batches: Iterable[tuple[Any, Any]], seed: int) -> Iterator[tuple[Any, Any]]:
    """The batches, their random numbers drawn from a generator of their own: the same whatever a rank's stages draw."""
    source, generator = iter(batches), torch.Generator().manual_seed(derive(seed, "data"))
    while True:
        with OwnGenerator(generator):
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _now(device: torch.device) -> Any:
    """The host's clock, or on CUDA an event that the device passes when it gets there."""
    if device.type != "cuda":
        return time.perf_counter()
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))


def _check(contracts: PipelineContracts, plan: Plan, kind: str) -> None:
    """Refuse what torch.distributed.pipelining cannot run."""
    name = f"strategy 'torch-{kind}'"
    if torch.__version__ < "2.11":  # by version, not by letters
        raise ConfigError(f"{name} needs torch 2.11 or newer, this is {torch.__version__}; choose '{kind}'")
    if plan.schedule.structure.ties:
        raise PlanError(f"{name} cannot train weights that two stages have in common (tied embeddings); choose '{kind}'")
    if plan.demands.momentum or plan.demands.clip or plan.demands.batch_loss or plan.demands.features:
        raise PlanError(
            f"{name} is measured for frozen teachers, losses of the outputs of a microbatch and no clipping only; choose '{kind}'"
        )
    if plan.num_devices != dist.get_world_size():
        raise PlanError(f"the plan has {plan.num_devices} stages, but {dist.get_world_size()} processes were started")
    if kind == "1f1b" and plan.microbatches < plan.num_devices:
        few = f"{plan.microbatches} microbatches for {plan.num_devices} stages"
        raise PlanError(f"{name} needs at least one microbatch a stage, got {few}; choose 'torch-gpipe'")
    crossed = [contracts.inputs, *(contracts.student[0][blocks.stop - 1] for blocks in ranges(plan.student_partition))]
    crossed += [contracts.teacher[0][blocks.stop - 1] for blocks in ranges(plan.teacher_partition)]
    one_tensor = pytree.tree_structure(torch.empty(0))
    wrong = [contract.where for contract in crossed if contract.spec != one_tensor or not contract.tensor_leaves]
    if wrong:
        raise ModelError(
            f"{name} passes one tensor from block to block, and {', '.join(wrong)} there is another value; "
            f"cut the model elsewhere, or choose '{kind}'"
        )
