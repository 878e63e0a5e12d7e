"""Schedules as data: actions, rows of actions per rank, what they need, and the proof that they can run."""

from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.check import Proof, check
from pipestill.schedule.pipeline.generate import PIPELINE_STRATEGIES, generate
from pipestill.schedule.schedule import PipelineStructure, Schedule
from pipestill.schedule.trace import Event, Trace

__all__ = [
    "PIPELINE_STRATEGIES",
    "Action",
    "Event",
    "Kind",
    "Lane",
    "Op",
    "PipelineStructure",
    "Proof",
    "Role",
    "Schedule",
    "Trace",
    "check",
    "generate",
]
