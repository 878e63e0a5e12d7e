"""Traces that tests of pictures draw, and the boxes of an SVG."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from pipestill.costs import BlockCosts, Costs, Link, StageCosts
from pipestill.schedule import Event, Op, Trace, generate
from pipestill.schedule.blockwise.generate import Portion, sliced, staged
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.blockwise.structure import BlockwiseCosts
from pipestill.schedule.simulate import simulate

SVG = "{http://www.w3.org/2000/svg}"


def uniform(num_stages: int, forward: float = 1.0) -> StageCosts:
    costs = Costs.uniform(num_stages, forward, forward, 2 * forward)
    return costs.stages([1] * num_stages, [1] * num_stages)


def trace_of(strategy: str, num_stages: int, num_microbatches: int, forward: float = 1.0) -> Trace:
    costs = uniform(num_stages, forward)
    return simulate(generate(strategy, num_stages, num_microbatches, costs=costs), costs)


def measured(num_stages: int = 2, num_microbatches: int = 4, origin: float = 1.7e9) -> Trace:
    """Like what an executor records: uneven, late on its clock, with data, losses and updates that take time."""
    student = [BlockCosts(f"s{i}", 1e-3 + 1e-4 * i, 2.3e-3 - 1e-4 * i, 6e-4) for i in range(num_stages)]
    teacher = [BlockCosts(f"t{i}", 9e-4 + 5e-5 * i) for i in range(num_stages)]
    whole = Costs(tuple(student), tuple(teacher), loss_seconds=7e-4, data_seconds=5e-4)
    costs = whole.stages([1] * num_stages, [1] * num_stages)
    return shifted(simulate(generate("1f1b", num_stages, num_microbatches), costs), origin)


def shifted(trace: Trace, by: float) -> Trace:
    return Trace(trace.num_ranks, tuple(Event(e.rank, e.action, e.start + by, e.end + by) for e in trace.events))


def without_updates(trace: Trace) -> Trace:
    return Trace(trace.num_ranks, tuple(e for e in trace.events if e.action.op is not Op.UPDATE))


EMPTY = Trace(2, ())


def blockwise_trace(window: int = 1, num_steps: int = 20) -> Trace:
    """Block 0 on two ranks, block 1 on a third, for which a batch takes 4 seconds; or both on one, in windows."""
    link = Link(0.25)
    profile = BlockProfile(tuple(BlockTimes("", (1,), (1.0,), (3.0,), 0, 0) for _ in range(2)), link)
    schedule = staged("hybrid", [(range(1), (0, 1)), (range(1, 2), (2,))])
    if window > 1:
        portions = [[Portion(0, range(window))], [Portion(1, range(window))]]
        schedule = sliced(window, portions, portions, 2, teacher_first=True)
    return simulate(schedule, BlockwiseCosts(profile, 1), num_steps)


def groups(path: Path) -> dict[str, list[list[tuple[float, float]]]]:
    """The corners of every box in an SVG, by the id of its group."""
    found = {}
    for group in ET.parse(path).getroot().iter(f"{SVG}g"):
        if group.get("id", "").startswith("trace"):
            outlines = [p.get("d", "") for p in group.iter(f"{SVG}path") if p.get("clip-path")]
            points = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", outline) for outline in outlines]
            found[group.get("id", "")] = [[(float(x), float(y)) for x, y in corners] for corners in points]
    return found


def num_boxes(boxes: dict[str, list[list[tuple[float, float]]]], prefix: str) -> int:
    return sum(len(found) for name, found in boxes.items() if name.startswith(prefix))
