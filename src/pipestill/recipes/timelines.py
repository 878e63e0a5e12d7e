"""Timelines of a run: its trace files, and pictures of what was predicted above what happened."""

from collections.abc import Sequence
from pathlib import Path

from pipestill import draw
from pipestill.plan import Plan
from pipestill.plan.blockwise.describe import phase_titles
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.schedule import Trace


def trace_names(num_traces: int = 1) -> list[str]:
    """Names of the trace files: one, or one for each phase."""
    return [f"trace{'' if num_traces == 1 else f'-{number}'}.json.gz" for number in range(num_traces)]


def draw_pipeline(plan: Plan, trace: Trace, path: Path, num_steps: int = 2) -> None:
    """Draw a pipeline's timeline, predicted and measured."""
    on = f"{plan.strategy} on {plan.num_devices} {'device' if plan.num_devices == 1 else 'devices'}"
    titles = [f"{on}, predicted", f"{on}, measured"]
    draw.picture([plan.prediction, trace], path, titles=titles, num_steps=num_steps)


def draw_blocks(plan: BlockwisePlan, traces: Sequence[Trace], path: Path, num_steps: int | None = None) -> None:
    """Draw what was predicted above what happened; of several phases, what happened in each.

    `num_steps` are steps of the schedule (default: two where a step is one batch, else one).
    """
    titles, steps = phase_titles(plan), num_steps or (1 if plan.window > 1 else 2)
    if len(traces) == 1:
        traces, titles = [plan.predictions[0], *traces], [f"{titles[0]}, predicted", f"{titles[0]}, measured"]
    draw.picture(traces, path, titles=titles, num_steps=steps)
