"""Schedules as data: actions, rows of actions per rank, what they need, and the proof that they can run."""

from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.check import Proof, check
from pipestill.schedule.generate import STRATEGIES, generate
from pipestill.schedule.program import Schedule, Structure
from pipestill.schedule.trace import Event, Trace

__all__ = [
    "STRATEGIES",
    "Action",
    "Event",
    "Kind",
    "Lane",
    "Op",
    "Proof",
    "Role",
    "Schedule",
    "Structure",
    "Trace",
    "check",
    "generate",
]
