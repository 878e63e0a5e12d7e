"""Drawn tables of schedules: those in docstrings, and those that schedules make."""

import re
from types import ModuleType

from schedule.tasks import Task, word

from pipestill.costs import StageCosts
from pipestill.schedule import Action, Op, PipelineStructure, Schedule
from pipestill.schedule.simulate import simulate


def drawn(module: ModuleType) -> list[list[str]]:
    """The table of the module's docstring: what each rank does, one word a unit of time."""
    lines = re.findall(r"^ *rank \d+   (.*?)(?:  +\(.*)?$", str(module.__doc__), flags=re.MULTILINE)
    return [line.split() for line in lines]


def timed(schedule: Schedule, num_ranks: int, step: int) -> list[list[str]]:
    """One step as a table, where all work takes one unit of time."""
    equal = StageCosts(*[(1.0,) * num_ranks] * 4)
    trace = simulate(schedule, equal)
    ends = [0.0] * len(trace.steps())
    for event in trace.events:
        if event.action.op is Op.UPDATE:
            ends[event.action.step] = max(event.end, ends[event.action.step])
    first, last = ends[step - 1] if step else 0.0, ends[step]
    table = [[".."] * round(last - first) for _ in range(num_ranks)]
    for event in trace.events:
        if event.seconds > 0 and first <= event.start < last:
            table[event.rank][round(event.start - first)] = word(event.action, step)
    return [_strip(row) for row in table]


def _strip(row: list[str]) -> list[str]:
    while row[-1] == "..":
        row.pop()
    return row


def work(row: tuple[Action, ...]) -> list[str]:
    return [word(a, 0) for a in row if a.computes and a.op not in (Op.DATA, Op.LOSS)]


def rows_of_task(task: Task, costs: StageCosts) -> tuple[list[list[Action]], PipelineStructure]:
    schedule = task.schedule(costs)
    work = [[a for a in row if a.computes and a.op is not Op.DATA] for row in schedule.rows]
    return work, schedule.structure
