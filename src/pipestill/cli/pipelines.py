"""What commands show and do with costs and plans of pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.text import Text

from pipestill import draw
from pipestill.cli.figures import FigureTable, milliseconds, say, show_line, shown_bytes
from pipestill.cli.files import write_json
from pipestill.cli.kinds import SearchReport, considered_figures, tell_considered
from pipestill.costs import BlockCosts, Costs, Link
from pipestill.plan import Plan, make_plan
from pipestill.plan.search import Search, search_pipelines
from pipestill.recipes.run_options import Kind
from pipestill.recipes.timelines import draw_pipeline, trace_names
from pipestill.schedule import PIPELINE_STRATEGIES, Trace
from pipestill.schedule.pipeline.structure import Demands

if TYPE_CHECKING:
    from pipestill.cli.without_recipe import PlanningOptions, SimulateOptions
    from pipestill.compare.figures import Comparison
    from pipestill.compare.virtual import VirtualOptions  # which loads torch

NOT_MEASURED = "links were not measured: one process has none, and --devices N starts more"


@dataclass(frozen=True)
class PipelineReport:
    """A pipeline's plan, with what commands show of it."""

    plan: Plan

    @property
    def title(self) -> str:
        """The plan in a few words."""
        plan = self.plan
        knobs = [f"stash {plan.stash}"] if plan.stash is not None else []
        knobs += ["split backward"] if plan.split_backward else []
        knobs += [f"staleness {plan.staleness}"] if plan.staleness is not None else []
        return ", ".join([plan.strategy, *knobs, f"{plan.num_devices} devices", f"{plan.microbatches} microbatches"])

    @property
    def trace_files(self) -> list[str]:
        """Names of the trace files in the directory of a run with this plan."""
        return trace_names()

    def figures(self) -> dict[str, Any]:
        """Give what is predicted, for JSON."""
        plan, trace = self.plan, self.plan.prediction
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

    def picture(self, path: Path, title: str, num_steps: int | None, unit: draw.Unit) -> None:
        """Draw the predicted timeline."""
        draw.picture([self.plan.prediction], path, titles=[title], num_steps=2 if num_steps is None else num_steps, unit=unit)

    def tell(self, console: Console, title: str, unit: draw.Unit, schedule: bool) -> None:
        """Print the predicted timeline and figures, and the schedule too where it is asked for."""
        plan, trace = self.plan, self.plan.prediction
        if schedule:
            show_line(console, draw.schedule_table(plan.schedule))
        console.print(Text.from_ansi(draw.text(trace, width=console.width, colour=console.is_terminal, unit=unit)))
        step, least = (
            f"{x:g} time units" if unit is None else f"{x * 1e3:.2f} ms"
            for x in (trace.seconds_per_step, plan.limit_seconds_per_step)
        )
        say(
            console,
            f"{title}: {step} a step (with this partition, no less than {least}), utilisation {trace.utilisation:.1%}; "
            f"the ranks stash at most {' '.join(map(str, trace.stash_peak))} microbatches, "
            f"the teacher is at most {plan.proof.run_ahead} ahead",
        )
        if plan.memory_bytes:
            self.stages_table().show(console)
        if plan.costs.source:
            say(console, f"costs {plan.costs.source}")

    def stages_table(self) -> FigureTable:
        """Make the table of what each rank holds and does, a row each."""
        plan, trace = self.plan, self.plan.prediction
        table = FigureTable("rank", "student blocks", "teacher blocks", "busy", "stash", "memory")
        busy = trace.busy_seconds_per_step()
        for rank in range(plan.num_devices):
            share = busy[rank] / trace.seconds_per_step if trace.seconds_per_step else 0.0
            table.add_row(
                str(rank), _range(plan.student_partition, rank), _range(plan.teacher_partition, rank),
                f"{min(1.0, share):.1%}", str(trace.stash_peak[rank]),
                shown_bytes(plan.memory_bytes[rank]) if plan.memory_bytes else "",
            )  # fmt: skip
        return table

    def run_picture(self, traces: Sequence[Trace], path: Path, num_steps: int) -> None:
        """Draw what happened in a run, beside what was predicted."""
        draw_pipeline(self.plan, traces[0], path, num_steps)

    def run_figures(self, traces: Sequence[Trace], summary: dict[str, Any], files: Sequence[Path]) -> dict[str, Any]:
        """Give what was measured in a run, for JSON, from its traces, its summary.json and the files of the traces."""
        (trace,) = traces
        return {
            "seconds_per_step": trace.median_seconds_per_step,
            "utilisation": trace.utilisation,
            "bubble": trace.bubble,
            "stash_peak": list(trace.stash_peak),
            "perfetto": str(files[0]),
        }

    def tell_run(self, console: Console, figures: dict[str, Any]) -> None:
        """Print what happened in a run, from the figures."""
        say(
            console,
            f"{figures['seconds_per_step'] * 1e3:.1f} ms a step, utilisation {figures['utilisation']:.1%}, "
            f"stash peak {' '.join(map(str, figures['stash_peak']))}",
        )


def _range(partition: tuple[int, ...], rank: int) -> str:
    if not partition:
        return ""
    first = sum(partition[:rank])
    last = first + partition[rank] - 1
    return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class PipelinePlanner:
    """Plans a pipeline from the costs of its blocks and what the task asks of a schedule."""

    kind: ClassVar[Kind] = "pipeline"
    strategies: ClassVar[tuple[str, ...]] = tuple(PIPELINE_STRATEGIES)

    costs: Costs
    demands: Demands

    @property
    def num_blocks(self) -> str:
        """The numbers of both models' blocks, in words."""
        return f"{len(self.costs.student)} student and {len(self.costs.teacher)} teacher blocks"

    def make(self, options: SimulateOptions) -> PipelineReport:
        """Plan one strategy (default: fill)."""
        return PipelineReport(make_plan(
            self.costs, devices=options.devices, strategy=options.strategy or "fill", microbatches=options.microbatches,
            run_ahead=options.run_ahead, staleness=options.staleness, split_backward=options.split_backward,
            stash=options.stash, demands=self.demands, memory_bytes=options.memory,
        ))  # fmt: skip

    def search(self, options: PlanningOptions, progress: Callable[[str], object]) -> SearchReport:
        """Plan every strategy, or every variant of the one that the options name; `progress` hears what is planned."""
        found = search_pipelines(
            self.costs, self.demands, devices=options.devices, microbatches=options.microbatches,
            staleness=options.staleness, strategy=options.strategy, memory_bytes=options.memory, progress=progress,
        )  # fmt: skip
        figures = {
            "kind": self.kind, "devices": options.devices, "microbatches": options.microbatches, "rows": self.costs.rows,
            "costs": self.costs.source, "memory_limit_bytes": options.memory and int(options.memory),
            "chosen": found.chosen.name, "considered": considered_figures(found, _considered),
        }  # fmt: skip
        plan = found.plan
        keys: dict[str, Any] = {"strategy": plan.strategy, "microbatches": options.microbatches}
        keys |= {"split_backward": True} if plan.split_backward else {}
        keys |= {"stash": plan.stash} if plan.stash is not None else {}
        keys |= {"staleness": plan.staleness} if plan.staleness else {}
        keys["student_partition"] = plan.student_partition
        keys |= {"teacher_partition": plan.teacher_partition} if plan.teacher_partition else {}
        return SearchReport(figures, plan.to_json(), keys, lambda console: self._tell_search(found, console))

    def _tell_search(self, found: Search[Plan], console: Console) -> None:
        tell_considered(found, console, ("ms a step", "busy", "stash", "stale", "memory"), lambda plan: [
            milliseconds(plan.prediction.seconds_per_step), f"{plan.prediction.utilisation:.1%}",
            str(max(plan.proof.stash_peak)), str(plan.proof.staleness),
            shown_bytes(max(plan.memory_bytes)) if plan.memory_bytes else "",
        ])  # fmt: skip
        plan = found.plan
        say(console, f"{found.chosen.name}, by rank:")
        PipelineReport(plan).stages_table().show(console)
        if self.costs.source:
            say(console, f"costs {self.costs.source}")
        say(
            console,
            f"A step is {plan.microbatches} microbatches of {self.costs.rows} rows; with this "
            f"partition none takes less than {milliseconds(plan.limit_seconds_per_step)} ms. Stash is in units (a microbatch in "
            "one view) of the rank that holds most; stale is how many steps old the weights are that a step reads.",
        )

    def save(self, path: str) -> None:
        """Write the costs to a file."""
        write_json(path, self.costs.to_json())

    def figures(self, microbatches: int) -> dict[str, Any]:
        """Give the costs, for JSON; they are of one of so many microbatches."""
        return {"microbatches": microbatches, "costs": self.costs.to_json()}

    def tell(self, console: Console, devices: int) -> None:
        """Print the costs, which were measured with `devices` processes."""
        costs = self.costs
        computed = costs.source.startswith("computed")
        say(console, f"milliseconds of one microbatch of {costs.rows} rows{'' if computed else ', median'}; update once a batch")
        table = FigureTable("block", "forward", "backward", "of weights", "update", "parameters", "output", "stash")
        for role, blocks in (("teacher", costs.teacher), ("student", costs.student)):
            for index, block in enumerate(blocks):
                table.add_row(f"{role} {block_name(index, block.name)}", *_cells(block, role == "student"))
        table.show(console)
        views = f"; views take {', '.join(f'{v:.2f}' for v in costs.views)} of it" if len(costs.views) > 1 else ""
        say(console, f"loss {milliseconds(costs.loss_seconds)} ms{views}")
        if computed:
            say(console, f"costs {costs.source}")
        elif devices > 1:
            say(
                console,
                f"link: {shown_link(costs.link)}, and {milliseconds(costs.link.wake_seconds)} ms more after a wait; a message "
                f"keeps either end for {milliseconds(costs.link.handling_seconds)} ms; while all {devices} processes compute, "
                f"work takes {costs.interference:.2f} times as long",
            )
        else:
            say(console, NOT_MEASURED)

    def compare(self, options: VirtualOptions, microbatches: int) -> Comparison:
        """Compare strategies on virtual devices, which wait for as long as the costs say."""
        from pipestill.compare.virtual import compare_virtual_pipelines

        costs = self.costs.with_surroundings(self.costs.link.only(), 1.0)
        return compare_virtual_pipelines(costs, self.demands, options, microbatches=microbatches)


def _considered(plan: Plan) -> dict[str, Any]:
    return {**PipelineReport(plan).figures(), "split_backward": plan.split_backward, "stash": plan.stash}


def _cells(block: BlockCosts, trains: bool) -> list[str]:
    own = (block.backward_seconds, block.weight_seconds, block.update_seconds)
    training = [milliseconds(seconds) if trains else "" for seconds in own]
    return [
        milliseconds(block.forward_seconds), *training, shown_bytes(block.parameter_bytes), shown_bytes(block.output_bytes),
        shown_bytes(block.stash_bytes) if trains else "",
    ]  # fmt: skip


def block_name(index: int, name: str) -> str:
    """Name a block for a person: its number, with its name where it has another."""
    return name if name == str(index) else f"{index}: {name}"


def shown_link(link: Link) -> str:
    """Say for a person how long a message takes."""
    return f"{link.latency_seconds * 1e6:.0f} us, then {link.bytes_per_second / 1e9:.3g} GB/s"
