"""What tests of schedules share: random tasks and costs, tampered schedules, and rows written as text."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import strategies as st

from pipestill.costs import Costs, Link, StageCosts
from pipestill.errors import ScheduleError
from pipestill.schedule import PIPELINE_STRATEGIES, Action, Op, Role, Schedule, check, generate

positive = st.integers(1, 9).map(float) | st.floats(1e-3, 1e3)
maybe_zero = st.just(0.0) | positive


# ---------------------------------------------------------------- tasks and costs


@dataclass(frozen=True)
class Task:
    """What a schedule is asked for."""

    strategy: str
    num_stages: int
    num_microbatches: int
    asked: dict[str, Any]

    def schedule(self, costs: StageCosts | None = None, **changes: Any) -> Schedule:
        return generate(self.strategy, self.num_stages, self.num_microbatches, costs=costs, **{**self.asked, **changes})

    @property
    def momentum(self) -> bool:
        return bool(self.asked.get("momentum"))

    @property
    def staleness(self) -> int:
        """What the strategy declares, in words of its documentation."""
        return int(self.momentum and (self.strategy in ("tspipe", "async") or bool(self.asked.get("staleness"))))


@st.composite
def tasks(draw: st.DrawFn, strategies: Collection[str] = PIPELINE_STRATEGIES, most_stages: int = 4, most_units: int = 10) -> Task:
    """Every strategy with everything that it allows, of at most `most_units` units a step."""
    strategy = draw(st.sampled_from(sorted(strategies)))
    stages = draw(st.integers(1, most_stages))
    views = 1 if strategy == "async" else draw(st.integers(1, 2))  # see test_async_with_two_views_does_not_get_stuck
    pieces = 2 if strategy == "tspipe" else 1
    microbatches = draw(st.integers(1, most_units // (views * pieces)))
    teacher = strategy in ("tspipe", "async") or draw(st.sampled_from([True, True, False]))
    momentum = strategy == "async" or (teacher and draw(st.booleans()))
    asked: dict[str, Any] = {
        "teacher": teacher,
        "momentum": momentum,
        "views": views,
        "teacher_views": draw(st.integers(1, views)),
        "batch_loss": draw(st.booleans()),
        "clip": draw(st.booleans()),
    }
    if teacher and draw(st.booleans()):
        stage = st.integers(0, stages - 1)
        asked["features"] = tuple(draw(st.lists(st.tuples(stage, stage), min_size=1, max_size=3)))
    if strategy == "fill":
        enough = microbatches if asked["batch_loss"] else stages  # microbatches that any pipeline holds
        asked["split_backward"] = draw(st.booleans())
        asked["stash"] = draw(st.sampled_from([None, "n", "2n-1", "all", enough, enough + 1]))
        if momentum:
            asked["staleness"] = draw(st.sampled_from([None, 0, 1]))
    return Task(strategy, stages, microbatches, asked)


@st.composite
def stage_costs(draw: st.DrawFn, num_stages: int, views: int = 1, link: bool = False) -> StageCosts:
    """Very unequal at times; a teacher, a loss and an update may cost nothing."""

    def each(value: st.SearchStrategy[float]) -> tuple[float, ...]:
        shared = draw(value)
        return (shared,) * num_stages if draw(st.booleans()) else tuple(draw(value) for _ in range(num_stages))

    links = st.builds(Link, maybe_zero, positive) if link else st.just(Link())
    backward = each(positive)
    share = draw(st.sampled_from([0.25, 0.5, 1.0]))  # 0: see test_fill_of_weight_gradients_that_take_no_time
    return StageCosts(
        forward=each(positive),
        backward=backward,
        update=each(maybe_zero),
        teacher=each(maybe_zero),
        loss=draw(maybe_zero),
        data=draw(maybe_zero) if link else 0.0,
        activation_bytes=(1,) * num_stages if link else (),
        teacher_bytes=(2,) * num_stages if link else (),
        link=draw(links),
        interference=draw(st.just(1.0) | st.floats(1.0, 4.0)) if link else 1.0,
        weight=tuple(share * b for b in backward),
        ema=each(maybe_zero),
        views=(1.0, draw(positive))[:views],
        feature_seconds=each(maybe_zero),
        feature_bytes=(3, 5, 7) if link else (),
    )


def uniform(num_stages: int, teacher: float, forward: float, backward: float, **more: Any) -> StageCosts:
    """The same in every stage. `more`: `weight`, `views`, as of `Costs.uniform`."""
    ones = [1] * num_stages
    return Costs.uniform(num_stages, teacher, forward, backward, **more).stages(ones, ones)


# ---------------------------------------------------------------- rows as text


def rows_of(*texts: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(map(Action.parse, text.split())) for text in texts)


def lists_of(*texts: str) -> list[list[Action]]:
    return [list(row) for row in rows_of(*texts)]


def texts_of(rows: Sequence[Sequence[Action]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


def work_of(schedule: Schedule) -> list[str]:
    """The rows without reads of the data and transfers."""
    return texts_of([[a for a in row if a.computes and a.op is not Op.DATA] for row in schedule.rows])


def word(action: Action, step: int) -> str:
    """`F0`, `T0` for the teacher's in `step`, `t0` in another, `U`."""
    letter = action.op.value
    if action.role is Role.TEACHER and action.op is Op.FORWARD:
        letter = "T" if action.step == step else "t"
    return letter if action.microbatch is None else f"{letter}{action.microbatch}"


# ---------------------------------------------------------------- tampering


def places(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    """(rank, position, action) of everything in the rows."""
    for rank, row in enumerate(schedule.rows):
        for i, action in enumerate(row):
            yield rank, i, action


def with_row(schedule: Schedule, rank: int, row: Sequence[Action]) -> Schedule:
    return replace(schedule, rows=(*schedule.rows[:rank], tuple(row), *schedule.rows[rank + 1 :]))


def swapped(schedule: Schedule, rank: int, i: int, j: int) -> Schedule:
    row = list(schedule.rows[rank])
    row[i], row[j] = row[j], row[i]
    return with_row(schedule, rank, row)


def assert_refused(schedule: Schedule, rank: int | None = None, action: Action | None = None) -> None:
    """Refused with problems that each name a rank and an action, one of them the given ones."""
    with pytest.raises(ScheduleError) as error:
        check(schedule)
    for problem in error.value.problems:
        assert re.match(r"rank \d+: .*[ST]\d+[DFLBIWRNUE]\d*@\d+", problem), problem
        assert problem in str(error.value) or len(error.value.problems) > 20
    if action is not None:
        work = str(action).split("@")[0]
        named = [p for p in error.value.problems if work + "@" in p and (rank is None or p.startswith(f"rank {rank}:"))]
        assert named, f"nothing about {action} on rank {rank} in {error.value.problems}"
