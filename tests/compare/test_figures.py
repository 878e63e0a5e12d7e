"""Figures of comparisons from known numbers."""

from dataclasses import replace
from itertools import count

import pytest

from pipestill.compare.figures import (
    PlainLoop,
    around_rounds,
    calibrated,
    ceiling_figures,
    enough_steps,
    in_rounds,
    machine_figures,
    median_link,
    median_loop,
    strategy_figures,
    with_spread,
)
from pipestill.costs import BlockCosts, Costs, Link

SECONDS = {"slow": [4.0, 8.0, 6.0], "fast": [2.0, 2.0, 2.0]}
LOOPS = [PlainLoop(3.0, 4.0), PlainLoop(4.0, 4.0), PlainLoop(2.0, 4.0)]  # ceilings of two devices: 1.5, 2, 1


def test_median_and_spread() -> None:
    assert with_spread("seconds", [3.0, 1.0, 2.5]) == {"seconds": 2.5, "seconds_spread": [1.0, 3.0]}
    assert with_spread("one", [2.0]) == {"one": 2.0, "one_spread": [2.0, 2.0]}


def test_speedups_are_over_the_first_strategy_of_the_same_round() -> None:
    figures = strategy_figures(SECONDS)
    assert list(figures) == ["slow", "fast"]
    assert figures["slow"] == {
        "strategy": "slow",
        "seconds_per_step": 6.0,
        "seconds_per_step_spread": [4.0, 8.0],
        "speedup": 1.0,
        "speedup_spread": [1.0, 1.0],
    }
    assert figures["fast"]["speedup"] == 3.0  # the median of 2, 4 and 3
    assert figures["fast"]["speedup_spread"] == [2.0, 4.0]


def test_the_ceiling_is_what_independent_processes_reach_together() -> None:
    assert PlainLoop(2.0, 2.0).ceiling(4) == 4.0  # they do not disturb each other
    assert PlainLoop(2.0, 8.0).ceiling(4) == 1.0  # they share one core
    assert machine_figures(LOOPS, 2) == {
        "devices": 2,
        "rounds": 3,
        "alone_seconds_per_step": 3.0,
        "together_seconds_per_step": 4.0,
        "ceiling": 1.5,
        "ceiling_spread": [1.0, 2.0],
    }


def test_shares_of_the_ceiling_are_of_the_same_round() -> None:
    figures = ceiling_figures(SECONDS, LOOPS, 2)
    # Speedups of `fast` over the plain loop are 1.5, 2 and 1: each is all of its round's ceiling.
    assert figures["fast"]["share_of_ceiling"] == 1.0
    assert figures["fast"]["share_of_ceiling_spread"] == [1.0, 1.0]
    # Those over `slow` are 2, 4 and 3; divided by 1.5, 2 and 1: 1.33, 2 and 3.
    assert figures["fast"]["speedup_share_of_ceiling"] == 2.0
    assert figures["slow"]["share_of_ceiling"] == pytest.approx(1 / 3)  # of 0.5, 0.25 and 1/3
    assert figures["slow"]["share_of_ceiling_spread"] == pytest.approx([0.25, 0.5])


def test_the_loop_of_a_round_is_between_those_before_and_after_it() -> None:
    assert around_rounds(LOOPS) == [PlainLoop(3.5, 4.0), PlainLoop(3.0, 4.0)]
    assert median_loop(LOOPS) == PlainLoop(3.0, 4.0)


def test_links_have_the_median_of_each_figure() -> None:
    links = [Link(1e-5, 1e9, 0.0, 3e-5), Link(3e-5, 3e9, 0.2, 1e-5), Link(2e-5, 2e9, 0.1, 2e-5)]
    assert median_link(links) == Link(2e-5, 2e9, 0.1, 2e-5)


def test_calibrated_costs_add_up_to_the_plain_loop() -> None:
    student = (BlockCosts("a", 1.0, 2.0, update_seconds=0.5), BlockCosts("b", 1.0, 2.0, update_seconds=0.5))
    costs = Costs(student, (BlockCosts("t", 3.0),), loss_seconds=1.0, views=(1.0, 1.0))
    links = [Link(1e-5), Link(3e-5)]
    # Two microbatches, each in two views of the student and one of the teacher, and the update.
    assert costs.seconds_of_step(2, 1) == 2 * (2 * 6.0 + 3.0 + 1.0) + 1.0
    found = calibrated(costs, [PlainLoop(66.0, 99.0)] * 2, links, microbatches=2, teacher_views=1)
    assert found == costs.scaled(2.0).with_surroundings(Link(2e-5), 1.5)
    assert found.seconds_of_step(2, 1) == 66.0


def test_processes_that_help_each_other_do_not_interfere() -> None:
    costs = replace(Costs.uniform(1, 1.0, 1.0, 1.0), loss_seconds=1.0)
    found = calibrated(costs, [PlainLoop(4.0, 3.9)], [Link()], microbatches=1, teacher_views=1)
    assert found.interference == 1.0


@pytest.mark.parametrize(
    ("wanted", "fewest", "seconds_per_step", "steps"),
    [(12, 3, 0.1, 12), (12, 3, 4.0, 5), (12, 3, 100.0, 3), (2, 3, 0.1, 3)],
    ids=["as wanted", "as last 20 s", "the fewest that tell", "never less"],
)
def test_steps_that_take_long_are_measured_fewer_times(wanted: int, fewest: int, seconds_per_step: float, steps: int) -> None:
    assert enough_steps(wanted, fewest, seconds_per_step, 20.0) == steps


def test_strategies_take_turns_in_every_round() -> None:
    log, number = list[str](), count()

    def measure(name: str) -> int:
        log.append(name)
        return next(number)

    measured = in_rounds(["a", "b"], 2, measure, lambda: log.append("machine"))
    assert log == ["a", "b", "machine", "a", "b", "machine"]
    assert measured == {"a": [0, 2], "b": [1, 3]}


def test_a_strategy_that_is_named_twice_is_measured_once() -> None:
    assert in_rounds(["a", "a"], 1, len) == {"a": [1]}
