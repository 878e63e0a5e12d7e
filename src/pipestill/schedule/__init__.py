"""Schedules as data: actions, rows of actions per rank, what they need, and the proof that they can run."""

from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.check import check
from pipestill.schedule.pipeline.generate import PIPELINE_STRATEGIES, generate
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.structure import Proof, Structure
from pipestill.schedule.trace import Event, Trace

KINDS: tuple[type[Structure], ...] = (PipelineStructure, BlockwiseStructure)
"""The structures that a schedule's text may be of: `Schedule.from_text(text, *KINDS)`."""

__all__ = [
    "KINDS",
    "PIPELINE_STRATEGIES",
    "Action",
    "BlockwiseStructure",
    "Event",
    "Kind",
    "Lane",
    "Op",
    "PipelineStructure",
    "Proof",
    "Role",
    "Schedule",
    "Structure",
    "Trace",
    "check",
    "generate",
]
