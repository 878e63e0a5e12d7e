"""Seconds, steps and samples between logged steps."""

from __future__ import annotations

import time
from typing import NamedTuple


class Lap(NamedTuple):
    """The time between two logged steps, and the steps and samples that were trained in it."""

    seconds: float
    steps: int
    rows: int

    def values(self, bubble: float) -> dict[str, float]:
        """What a logged step says of the time: seconds of a step, samples a second, and the ranks' idle fraction."""
        return {"seconds": self.seconds / self.steps, "samples_per_second": self.rows / self.seconds, "bubble": bubble}


class LogClock:
    """Counts time, steps and samples since the last logged step, on the rank that reports."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._steps = 0
        self._rows = 0

    def count(self, rows: int, steps: int = 1) -> None:
        """Count trained steps and their samples."""
        self._steps += steps
        self._rows += rows

    def lap(self) -> Lap:
        """Everything since the last lap; the next one starts now."""
        now = time.perf_counter()
        lap = Lap(now - self._start, self._steps, self._rows)
        self._start = now
        self._steps = 0
        self._rows = 0
        return lap

    def skip(self) -> None:
        """Start the time anew, so that what has just happened (a validation, say) does not count."""
        self._start = time.perf_counter()
