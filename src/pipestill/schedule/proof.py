"""What the checker establishes about a schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Versions:
    """The weight versions (counts of applied updates) that the forwards of one step read, over all stages."""

    step: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of a check; `problems` is empty when the schedule is valid."""

    problems: tuple[str, ...]
    versions: tuple[Versions, ...]
    stash_peak: tuple[int, ...]
    """For each rank, the most units of the student held between their forward and the end of their backward."""
    run_ahead: int
    """How far the teacher is ahead of the student at most: in units on one rank, or in steps where blocks train alone."""
    staleness: int
    """Newest version minus the version used, in steps: of the student, and of a teacher that moves."""
