"""Trains a workload under a strategy and by the plain loop, and compares every weight."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.model.batchnorm import batch_norms
from pipestill.plan import Plan
from pipestill.plan.blockwise.describe import describe
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.recipes.recipe import Recipe, SizedIterable, Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.runtime.pipeline.one_batch import microbatch_difference
from pipestill.runtime.world import OneProcess
from pipestill.train.data import Reader, inputs_and_targets, sample
from pipestill.train.engine import REFERENCE
from pipestill.train.result import Result

TOLERANCE = 1e-9
"""Largest relative difference that can come from rounding sums of float64 in another order."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The distance of a tensor's entries from the expected ones.

    Args:
        absolute: the largest distance of two entries; NaN where one of them is
        relative: the same, divided by the largest magnitude of the expected entries
    """

    absolute: float
    relative: float


def differences(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, Difference]:
    """Compare every expected tensor bit by bit; returns those that differ, by name."""
    return {name: difference(tensor, got[name]) for name, tensor in expected.items() if not torch.equal(tensor, got[name])}


def difference(expected: Tensor, got: Tensor) -> Difference:
    """Measure how far two tensors of one shape are apart."""
    absolute = float((expected.double() - got.double()).abs().max())
    magnitude = float(expected.double().abs().max())
    return Difference(absolute, absolute / max(magnitude, torch.finfo(torch.float64).tiny))


def is_rounding(found: Difference, tolerance: float) -> bool:
    """Whether a difference is within the tolerance; NaN never is."""
    return found.relative <= tolerance


TRANSPORTS = ("in-process", "process-group")


def verify(recipe: Recipe, options: RunOptions, *, steps: int, transports: tuple[str, ...], device_type: str) -> dict[str, Any]:
    """Train a recipe's task under `options` and as `reference`, and compare all weights and buffers of both models.

    Every epoch has a short last batch. Where a schedule declares stale weights, the reference keeps copies of the old ones
    and reads those. Tensors are compared bit by bit, but for one case: where ranks share the rows of a student block's
    batch, sums are rounded in another order, and batch statistics are those of fewer rows. There, everything is in float64
    with batch norm frozen, and differences up to `TOLERANCE` are rounding.

    Args:
        recipe: builds the workload
        options: how to run it
        steps: updates after which the weights are compared
        transports: those of `TRANSPORTS` to train over, all by the same plan
        device_type: cpu or cuda

    Returns:
        What `pipestill check --json` prints.
    """
    workload = few_batches(recipe, options.seed)
    trainer = workload.trainer(workload.task(), options)
    plan, costs, plain = None, dict[str, Any](), dict[str, Any]()
    if trainer.strategy != REFERENCE:
        world = OneProcess(options.devices)
        # once, so that all plans are one
        costs["costs"] = trainer.costs or trainer.measure(workload.loader, world=world)
        plan = workload.trainer(workload.task(), options, **costs).plan(workload.loader, world=world)
        plain = trainer.engine.plain_options(plan)
    float64 = plan is not None and trainer.engine.splits_rows(plan)
    expected, result = train_few(recipe, options.as_reference(), steps, float64=float64, **plain)
    if not hasattr(fresh := workload.task(), "momentum"):  # a frozen teacher has to be what it is before any training
        expected |= _state("teacher", fresh.teacher.double() if float64 else fresh.teacher)
    train = partial(train_few, recipe, options, steps, float64=float64, **costs)
    found: dict[str, dict[str, Difference]] = {}
    for transport in transports:
        if transport == "process-group" and options.devices > 1:
            got, result = launch(
                train, (), options.devices, device_type=device_type, threads=1, timeout_seconds=options.timeout_seconds
            )
        else:
            got, result = train()
        found[transport] = differences(expected, got)
    every, tolerance = [d for mine in found.values() for d in mine.values()], TOLERANCE if float64 else 0.0
    return {
        "strategy": options.strategy,
        "devices": options.devices,
        "steps": steps,
        "transports": list(transports),
        **_OWN_FIGURES[workload.kind](plan, options),
        **(_one_batch(workload, options) if workload.kind == "pipeline" else {}),
        "rows_split": float64,
        "dtype": "float64" if float64 else "float32",
        "batch_norm": "frozen" if float64 else "as trained",
        "exact": not every,
        "max_abs_difference": max([0.0, *(d.absolute for d in every)]),
        "max_relative_difference": max([0.0, *(d.relative for d in every)]),
        "tolerance": tolerance,
        "staleness": result.staleness,
        "whole_backwards": list(result.whole_backwards),
        "problems": [
            f"{transport}: '{name}' differs from the reference by up to {d.absolute:g}"
            for transport, mine in found.items()
            for name, d in mine.items()
            if not is_rounding(d, tolerance)
        ],
    }


def _one_batch(workload: Workload, options: RunOptions) -> dict[str, Any]:
    """How far the loss and gradients of one batch in 1 and in the options' microbatches are apart, or why that is not known."""
    task = workload.task()
    trainer = workload.trainer(task, options.as_reference())
    engine = trainer.engine
    reader = Reader(
        workload.loader, epochs=1, steps=1, seed=options.seed, split_batch=engine.split, length_axis=trainer.length_axis,
        counts=engine.counts,
    )  # fmt: skip
    with closing(reader):
        batch = reader.peek()
    frozen = options.batch_norm == "frozen"
    found = microbatch_difference(task, engine.contracts(sample(batch)), batch, options.microbatches, frozen_norms=frozen)
    return {"microbatch_difference": found.relative, "microbatch_difference_missing": found.reason or None}


def _pipeline_figures(plan: Plan | None, options: RunOptions) -> dict[str, Any]:
    versions = [dataclasses.asdict(version) for version in plan.proof.versions] if plan else []
    return {"microbatches": options.microbatches, "versions": versions}


def _blockwise_figures(plan: BlockwisePlan | None, options: RunOptions) -> dict[str, Any]:
    return {"ranks": describe(plan) if plan else []}


_OWN_FIGURES: dict[str, Callable[[Any, RunOptions], dict[str, Any]]] = {
    "pipeline": _pipeline_figures,
    "blockwise": _blockwise_figures,
}
"""For each kind of training, what only it reports."""


def few_batches(recipe: Recipe, seed: int) -> Workload:
    """Build the recipe's workload with seven batches in an epoch, of which the last is short."""
    batch_size = recipe.workload(seed).train_loader.batch_size or 1
    return recipe.workload(seed, 6 * batch_size + max(1, batch_size * 2 // 5))


def train_few(
    recipe: Recipe, options: RunOptions, steps: int, *, float64: bool = False, **others: Any
) -> tuple[dict[str, Tensor], Result]:
    """Train models as they are initialised for a few steps, on one thread.

    Args:
        recipe: builds the workload, of which an epoch is seven batches
        options: how to run it
        steps: updates
        float64: train in float64, with batch norm frozen
        others: arguments of the trainer that replace those of the options

    Returns:
        Both models' state by name, and the run's result.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums that are split over threads differ in their last bits
    try:
        workload = few_batches(recipe, options.seed)
        task, loader = workload.task(), workload.loader
        norms: AbstractContextManager[Any] = nullcontext()
        if float64:
            task.teacher.double()
            task.student.double().eval()  # the change to train mode leaves frozen layers out
            loader, norms = InFloat64(loader), batch_norms("frozen", [task.student_blocks])
        trainer = workload.trainer(task, options, **{"first_look": False, **others})
        with norms:
            result = trainer.fit(loader, steps=steps)
        return {**_state("student", task.student), **_state("teacher", task.teacher), **result.beside}, result
    finally:
        torch.set_num_threads(threads)


def _state(role: str, model: nn.Module) -> dict[str, Tensor]:
    return {f"{role}.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}


class InFloat64:
    """The batches of a loader, with inputs in float64."""

    def __init__(self, loader: SizedIterable) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for inputs, targets in map(inputs_and_targets, self.loader):
            yield inputs.double(), targets
