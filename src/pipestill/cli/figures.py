"""Figures of plans, as JSON and in words."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipestill.plan import Plan
from pipestill.plan.blockwise.describe import describe
from pipestill.plan.blockwise.plan import BlockwisePlan


def pipeline_figures(plan: Plan) -> dict[str, Any]:
    """What is predicted of a pipeline's plan, all of the steady state."""
    trace = plan.prediction
    return {
        "strategy": plan.strategy,
        "devices": plan.num_devices,
        "microbatches": plan.microbatches,
        "seconds_per_step": trace.seconds_per_step,
        "limit_seconds_per_step": plan.limit_seconds_per_step,
        "utilisation": round(trace.utilisation, 3),
        "bubble": round(trace.bubble, 3),
        "stash_peak": list(trace.stash_peak),
        "run_ahead": plan.proof.run_ahead,
        "staleness": plan.proof.staleness,
        "student_partition": list(plan.student_partition),
        "teacher_partition": list(plan.teacher_partition),
        "memory_bytes": list(plan.memory_bytes),
        "costs": plan.costs.source,
    }


def stages_table(plan: Plan) -> Table:
    """What each rank of a pipeline holds and does, a row each."""
    table = plain_table("rank", "student blocks", "teacher blocks", "busy", "stash", "memory")
    trace = plan.prediction
    busy = trace.busy_seconds_per_step()
    for rank in range(plan.num_devices):
        share = busy[rank] / trace.seconds_per_step if trace.seconds_per_step else 0.0
        table.add_row(
            str(rank), _range(plan.student_partition, rank), _range(plan.teacher_partition, rank), f"{min(1.0, share):.1%}",
            str(trace.stash_peak[rank]), shown_bytes(plan.memory_bytes[rank]) if plan.memory_bytes else "",
        )  # fmt: skip
    return table


def _range(partition: tuple[int, ...], rank: int) -> str:
    if not partition:
        return ""
    first = sum(partition[:rank])
    last = first + partition[rank] - 1
    return str(first) if first == last else f"{first}-{last}"


def block_figures(plan: BlockwisePlan) -> dict[str, Any]:
    """What is predicted of blocks that learn alone; a step is one batch for every block."""
    return {
        "strategy": plan.strategy,
        "devices": plan.num_devices,
        "batch": plan.costs.batch,
        "seconds_per_step": plan.seconds_per_batch,
        "limit_seconds_per_step": plan.limit_seconds_per_batch,
        "cost_model_seconds_per_step": plan.cost_model_seconds_per_batch,
        "utilisation": round(plan.utilisation, 3),
        "bubble": round(1.0 - plan.utilisation, 3),
        "window": plan.window,
        "memory_bytes": list(plan.memory_bytes),
        "plan": describe(plan),
    }


def who_does_what(plan: BlockwisePlan) -> list[str]:
    """A line for every rank, or for several that have the same to do."""
    held = [f" ({shown_bytes(size)})" for size in plan.memory_bytes] or [""] * plan.num_devices
    lines, first = [], 0
    for words, same in groupby(a + b for a, b in zip(describe(plan), held, strict=True)):
        last = first + len(list(same)) - 1
        lines.append(f"rank {first}: {words}" if first == last else f"ranks {first}-{last}: {words}")
        first = last + 1
    return lines


def shown_bytes(num_bytes: float) -> str:
    """Bytes for a person, in units of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:#.3g} {unit}" if num_bytes < 99.95 * size else f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def milliseconds(seconds: float) -> str:
    """Three digits of milliseconds, and all of them from 100 on."""
    return f"{seconds * 1e3:#.3g}" if seconds < 0.0995 else f"{seconds * 1e3:.0f}"


def plain_table(first: str, *others: str) -> Table:
    """Columns of figures behind one of names, with as few lines as there can be."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def wide_console() -> Console:
    """A terminal that breaks tables of up to 100 columns instead of cutting them off."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 100)
    return console
