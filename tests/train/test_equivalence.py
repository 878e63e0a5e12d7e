"""Every strategy gives the same weights, buffers and metrics as the plain loop, to the last bit."""

from functools import cache

import pytest
from support.cases import CASES, EVERYTHING, OPTIMIZERS, run
from support.fits import Outcome, assert_same

import pipestill as ps

PIPELINE_STRATEGIES = ("sequential", "gpipe", "1f1b", "fill")


@cache
def reference(microbatches: int, optimizer: str) -> Outcome:
    return EVERYTHING.run("reference", microbatches=microbatches, **OPTIMIZERS[optimizer])


@cache
def reference_of(case: str) -> Outcome:
    return CASES[case].run("reference")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("microbatches", [1, 3, 8])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", PIPELINE_STRATEGIES)
def test_everything_at_once(strategy: str, devices: int, microbatches: int, optimizer: str) -> None:
    got = EVERYTHING.run(strategy, devices, microbatches=microbatches, **OPTIMIZERS[optimizer])
    assert_same(got, reference(microbatches, optimizer))
    assert len(got.steps) == 8
    assert len(got.validations) == 2


@pytest.mark.parametrize(("strategy", "devices"), [("fill", 1), ("gpipe", 2), ("fill", "most"), ("1f1b", "most")])
@pytest.mark.parametrize("case", CASES)
def test_peculiar_models(case: str, strategy: str, devices: int | str) -> None:
    """Cut nowhere, in the middle, and everywhere."""
    most = CASES[case].most_devices()
    count = min(devices, most) if isinstance(devices, int) else most
    if "student_partition" in CASES[case].trainer:
        count = most
    assert_same(CASES[case].run(strategy, count), reference_of(case))


THRICE = ("dictionaries", "skips", "views", "turned", "in_place_starts", "frozen_first", "tied", "new_buffers", "steps")
"""What three processes run too."""


@pytest.mark.parametrize(("devices", "over"), [(2, "memory"), (3, "memory"), (3, "gloo")])
def test_processes(devices: int, over: str) -> None:
    """One process per rank; all runs one after the other in the same group."""
    runs = [
        (name, "fill", {})
        for name, case in CASES.items()
        if len(case.trainer.get("student_partition", range(devices))) == devices and (devices == 2 or name in THRICE)
    ]
    runs += [
        ("everything", strategy, {"microbatches": microbatches, **OPTIMIZERS["sgd"]})
        for strategy in PIPELINE_STRATEGIES
        for microbatches in (1, 8)
    ]
    outcomes = ps.launch(run, (runs, devices, over), devices, threads=1, timeout_seconds=60.0)
    for (name, _, trainer), outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, reference(trainer["microbatches"], "sgd") if trainer else reference_of(name))
