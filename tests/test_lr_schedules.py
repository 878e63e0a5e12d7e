import math
import pickle
import subprocess
import sys

import pytest

from pipestill import lr_schedules
from pipestill.errors import ConfigError


def factors(schedule, steps):
    return [round(schedule(step), 6) for step in range(steps)]


def test_cosine_falls_from_one_to_zero_and_stays():
    schedule = lr_schedules.cosine(4)
    assert factors(schedule, 6) == [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]
    assert schedule(1) == 0.5 * (1.0 + math.cos(math.pi / 4))


def test_cosine_rises_where_its_end_is_above_its_start():
    assert factors(lr_schedules.cosine(2, start=0.9, end=1.0), 4) == [0.9, 0.95, 1.0, 1.0]


def test_cosine_follows_a_warm_up_of_equal_rises():
    schedule = lr_schedules.cosine(6, warm_up_steps=2)
    assert factors(schedule, 7) == [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0]
    assert factors(lr_schedules.cosine(4, warm_up_steps=2, start=0.5), 3) == [0.25, 0.5, 0.5]


def test_linear_falls_evenly_behind_its_warm_up():
    assert factors(lr_schedules.linear(4), 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert factors(lr_schedules.linear(6, warm_up_steps=2, end=0.2), 7) == [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_a_training_that_is_all_warm_up_ends_where_it_should():
    for make in (lr_schedules.cosine, lr_schedules.linear):
        assert factors(make(2, warm_up_steps=2), 4) == [0.5, 1.0, 0.0, 0.0]


def test_steps_multiply_at_each_milestone():
    schedule = lr_schedules.steps((4, 2))
    assert [schedule(step) for step in range(6)] == [1.0, 1.0, 0.1, 0.1, 0.1**2, 0.1**2]
    assert lr_schedules.steps((1, 1), factor=0.5)(1) == 0.25


def test_warm_up_hands_on_to_another_schedule():
    assert factors(lr_schedules.warm_up(4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(lr_schedules.warm_up(1, lr_schedules.linear(2)), 4) == [1.0, 1.0, 0.5, 0.0]
    assert factors(lr_schedules.warm_up(0, lr_schedules.linear(2)), 2) == [1.0, 0.5]


def test_every_schedule_can_be_sent_to_another_process():
    for schedule in (
        lr_schedules.cosine(9, warm_up_steps=2), lr_schedules.linear(9), lr_schedules.steps((3, 6)), lr_schedules.warm_up(3),
    ):  # fmt: skip
        sent = pickle.loads(pickle.dumps(schedule))
        assert [sent(step) for step in range(9)] == [schedule(step) for step in range(9)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lr_schedules.cosine(0), "total_steps is 0; expected at least 1"),
        (lambda: lr_schedules.cosine(1.5), "total_steps is 1.5; expected a whole number"),
        (lambda: lr_schedules.linear(5, warm_up_steps=-1, end=-1), "warm_up_steps is -1; .*; end is -1; expected 0 or more"),
        (lambda: lr_schedules.steps([0.5]), "a milestone is 0.5; expected a whole number"),
        (lambda: lr_schedules.warm_up(-1), "warm_up_steps is -1; expected at least 0"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_schedules_need_no_torch():
    code = "import sys, pipestill.lr_schedules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
