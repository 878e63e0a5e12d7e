"""Schedules of every kind of pipeline, which tests tamper with."""

import pytest

from pipestill.schedule import generate
from pipestill.schedule.pipeline.sequential import forward_only

VALID = {
    "sequential": generate("sequential", 2, 2),
    "gpipe": generate("gpipe", 2, 3),
    "1f1b": generate("1f1b", 3, 3),
    "fill": generate("fill", 3, 3),
    "1f1b-alone": generate("1f1b", 2, 2, teacher=False),
    "ema": generate("gpipe", 2, 2, momentum=True, clip=True),
    "ema-split": generate("fill", 2, 2, momentum=True, split_backward=True),
    "ema-stale": generate("fill", 2, 2, momentum=True, staleness=1),
    "views": generate("1f1b", 2, 2, views=2, teacher_views=1, batch_loss=True),
    "tspipe": generate("tspipe", 2, 1, momentum=True, views=2, teacher_views=2, batch_loss=True),
    "async": generate("async", 2, 2, momentum=True),
    "forward-only": forward_only(2, 3),
    "features": generate("1f1b", 3, 2, features=((0, 2), (1, 0), (0, 0))),
    "features-filled": generate("fill", 2, 2, features=((0, 1), (1, 0)), split_backward=True, batch_loss=True),
    "features-in-turn": generate("sequential", 2, 2, features=((0, 1),)),
}

STALE = {"ema-stale", "tspipe", "async"}

each_schedule = pytest.mark.parametrize("schedule", VALID.values(), ids=VALID)
