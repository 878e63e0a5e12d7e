"""Every strategy gives the same weights, buffers and metrics as the plain loop, to the last bit."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import pytest
from support.cases import CASES, EVERYTHING, OPTIMIZERS, UNUSED, run
from support.fits import Outcome, assert_same
from support.pairwise import pairwise

import pipestill as ps

PIPELINE_STRATEGIES = ("sequential", "gpipe", "1f1b", "fill")


@cache
def reference(microbatches: int, optimizer: str) -> Outcome:
    return EVERYTHING.run("reference", microbatches=microbatches, **OPTIMIZERS[optimizer])


@cache
def reference_of(case: str) -> Outcome:
    return CASES[case].run("reference")


@pytest.mark.parametrize(
    *pairwise(strategy=PIPELINE_STRATEGIES, devices=(1, 2, 3, 4), microbatches=(1, 3, 8), optimizer=OPTIMIZERS)
)
def test_everything_at_once(strategy: str, devices: int, microbatches: int, optimizer: str) -> None:
    got = EVERYTHING.run(strategy, devices, microbatches=microbatches, **OPTIMIZERS[optimizer])
    assert_same(got, reference(microbatches, optimizer))
    assert len(got.steps) == 8
    assert len(got.validations) == 2


WAYS = (("fill", 1), ("gpipe", 2), ("1f1b", "most"), ("fill", "most"))
"""Strategies and numbers of devices by which a peculiar model is cut nowhere, in the middle, or everywhere."""


def case_by_way() -> Iterator[Any]:
    """Every case on as many devices as it has blocks; of the other ways, every second case has one, and the rest are slow."""
    for number, case in enumerate(CASES):
        for place, (strategy, devices) in enumerate(WAYS):
            always = place == (3 if number % 3 else 1 + number % 2)
            yield pytest.param(case, strategy, devices, marks=() if always else pytest.mark.slow)


@pytest.mark.filterwarnings(UNUSED)
@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("case", "strategy", "devices"), list(case_by_way()))
def test_peculiar_models(case: str, strategy: str, devices: int | str) -> None:
    most = CASES[case].most_devices()
    count = min(devices, most) if isinstance(devices, int) else most
    if "student_partition" in CASES[case].trainer:
        count = most
    assert_same(CASES[case].run(strategy, count), reference_of(case))


THRICE = (
    "dictionaries", "skips", "views", "turned", "in_place_starts", "frozen_first", "tied", "new_buffers", "steps",
    "several_features", "trained_losses", "two_teachers",
)  # fmt: skip
"""What three processes run too."""

BETWEEN = (
    *THRICE, "many", "scalars", "odd_types", "nested", "channels_last", "one_row", "stream", "lengths", "counted",
    "fused", "attention_maps",
)  # fmt: skip
"""What is peculiar about the tensors that cross between processes, or about the batches that they must agree on."""


FEW = ("dictionaries", "turned", "tied", "new_buffers")
"""What three processes run over gloo, with half of the strategies; two run the other half through memory."""


def assert_processes_train_the_same(
    cases: Iterable[str], devices: int, over: str, microbatches: Iterable[int], strategies: Iterable[str] = PIPELINE_STRATEGIES
) -> None:
    """One process per rank; all runs one after the other in the same group."""
    runs = [(name, "fill", {}) for name in cases if len(CASES[name].trainer.get("student_partition", range(devices))) == devices]
    runs += [
        ("everything", strategy, {"microbatches": count, **OPTIMIZERS["sgd"]})
        for strategy in strategies
        for count in microbatches
    ]
    outcomes = ps.launch(run, (runs, devices, over), devices, threads=1, timeout_seconds=60.0)
    for (name, _, trainer), outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, reference(trainer["microbatches"], "sgd") if trainer else reference_of(name))


@pytest.mark.parametrize(
    ("devices", "over", "cases", "strategies"),
    [(2, "memory", BETWEEN, ("gpipe", "fill")), pytest.param(3, "gloo", FEW, ("sequential", "1f1b"), marks=pytest.mark.slow)],
    ids=["2-memory", "3-gloo"],
)
def test_processes(devices: int, over: str, cases: tuple[str, ...], strategies: tuple[str, ...]) -> None:
    assert_processes_train_the_same(cases, devices, over, [3], strategies)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "over"), [(2, "memory"), (3, "memory"), (3, "gloo")])
def test_every_case_in_processes(devices: int, over: str) -> None:
    assert_processes_train_the_same(CASES if devices == 2 else THRICE, devices, over, [1, 3, 8])
