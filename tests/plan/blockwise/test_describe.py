"""Plans in words: which rank trains which blocks, and what each phase is called."""

import pytest
from schedule.blockwise.tasks import line

from pipestill.costs import Link
from pipestill.plan.blockwise.describe import describe, phase_titles
from pipestill.plan.blockwise.plan import BlockwisePlan, make_blockwise_plan
from pipestill.schedule.blockwise.profile import BlockProfile


def plan(strategy: str, devices: int, *seconds: float) -> BlockwisePlan:
    profile = BlockProfile(tuple(line(0.0, s) for s in seconds), Link())
    return make_blockwise_plan(profile, strategy=strategy, devices=devices, batch=12)


@pytest.mark.parametrize(
    ("strategy", "devices", "seconds", "lines"),
    [
        ("relay", 2, (1.0, 1.0, 2.0), ["teacher 0-1; student 0-1", "teacher 2; student 2"]),
        ("relay", 3, (1.0, 1.0), ["teacher 0; student 0", "teacher 1; student 1", "nothing"]),
        ("dp", 2, (1.0, 1.0), ["teacher 0:1/2; student 0:1/2 then teacher 0-1:1/2; student 1:1/2"] * 2),
        ("ls", 2, (1.0, 2.0), ["teacher 0-1; student 1", "teacher 0; student 0"]),
        ("hybrid", 3, (6.0, 3.0), ["teacher 0:1/2; student 0:1/2"] * 2 + ["teacher 1; student 1"]),
    ],
)
def test_each_rank_has_a_line(strategy: str, devices: int, seconds: tuple[float, ...], lines: list[str]) -> None:
    assert describe(plan(strategy, devices, *seconds)) == lines


def test_titles_name_what_a_phase_trains() -> None:
    assert phase_titles(plan("relay", 2, 1.0, 1.0)) == ["relay on 2 devices"]
    assert phase_titles(plan("dp", 2, 1.0, 1.0)) == ["dp on 2 devices: block 0, block", "dp on 2 devices: block 1, block"]
    assert phase_titles(plan("ls", 2, 1.0, 2.0)) == ["rank 0: block 1, block", "rank 1: block 0, block"]
    assert phase_titles(plan("dp", 1, 1.0)) == ["dp on 1 device"]
