"""What commands show and do with profiles and plans of blockwise training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.text import Text

from pipestill import draw
from pipestill.cli.figures import FigureTable, milliseconds, say, show_line, shown_bytes
from pipestill.cli.kinds import SearchReport, considered_figures, tell_considered
from pipestill.cli.pipelines import NOT_MEASURED, block_name, shown_link
from pipestill.plan.blockwise.describe import describe, phase_titles
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, BlockwisePlan, make_blockwise_plan
from pipestill.plan.blockwise.plan_json import blockwise_plan_to_json
from pipestill.plan.search import Search, search_blockwise
from pipestill.recipes.run_options import Kind
from pipestill.recipes.timelines import draw_blocks, trace_names
from pipestill.schedule import Trace
from pipestill.schedule.blockwise.profile import BlockProfile

if TYPE_CHECKING:
    from pipestill.cli.without_recipe import PlanningOptions, SimulateOptions
    from pipestill.compare.figures import Comparison
    from pipestill.compare.virtual import VirtualOptions  # which loads torch

_FEW = 8  # ranks of which every strategy's work is told; above, the chosen one's
_SHOWN = 3  # row counts of one table


@dataclass(frozen=True)
class BlockwiseReport:
    """A blockwise plan, with what commands show of it."""

    plan: BlockwisePlan

    @property
    def title(self) -> str:
        """The plan in a few words."""
        return f"{self.plan.strategy}, {self.plan.num_devices} devices"

    @property
    def trace_files(self) -> list[str]:
        """Names of the trace files in the directory of a run with this plan, one for each phase."""
        return trace_names(len(self.plan.phases))

    def figures(self) -> dict[str, Any]:
        """Give what is predicted, for JSON; a step is one batch for every block."""
        plan = self.plan
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

    def picture(self, path: Path, title: str, num_steps: int | None, unit: draw.Unit) -> None:
        """Draw the predicted timeline."""
        plan = self.plan
        titles = [title] if len(plan.phases) == 1 else phase_titles(plan)
        steps = (1 if plan.window > 1 else 2) if num_steps is None else num_steps
        draw.picture(plan.predictions, path, titles=titles, num_steps=steps)

    def tell(self, console: Console, title: str, unit: draw.Unit, schedule: bool) -> None:
        """Print the predicted timeline and figures, and the schedule too where it is asked for."""
        plan = self.plan
        for phase, trace, name in zip(plan.phases, plan.predictions, phase_titles(plan), strict=True):
            if len(plan.phases) > 1:
                say(console, name)
            if schedule:
                show_line(console, draw.schedule_table(phase.schedule))
            console.print(Text.from_ansi(draw.text(trace, width=console.width, colour=console.is_terminal)))
        for line in self.ranks():
            say(console, line)
        windows = f", in windows of {plan.window} batches" if plan.window > 1 else ""
        model = plan.cost_model_seconds_per_batch
        of_model = "" if model is None else f" ({milliseconds(model)} by the cost model of Pipe-BD)"
        say(
            console,
            f"{title}: {milliseconds(plan.seconds_per_batch)} ms a batch of {plan.costs.batch} rows through all blocks{windows}"
            f"{of_model}, utilisation {plan.utilisation:.1%}; all work once, divided evenly, takes "
            f"{milliseconds(plan.limit_seconds_per_batch)} ms",
        )

    def ranks(self) -> list[str]:
        """Describe the work of every rank in a line, or of several that have the same to do."""
        plan = self.plan
        held = [f" ({shown_bytes(size)})" for size in plan.memory_bytes] or [""] * plan.num_devices
        lines, first = [], 0
        for words, same in groupby(a + b for a, b in zip(describe(plan), held, strict=True)):
            last = first + len(list(same)) - 1
            lines.append(f"rank {first}: {words}" if first == last else f"ranks {first}-{last}: {words}")
            first = last + 1
        return lines

    def run_picture(self, traces: Sequence[Trace], path: Path, num_steps: int) -> None:
        """Draw what happened in a run, beside what was predicted."""
        draw_blocks(self.plan, traces, path, num_steps)

    def run_figures(self, traces: Sequence[Trace], summary: dict[str, Any], files: Sequence[Path]) -> dict[str, Any]:
        """Give what was measured in a run, for JSON, from its traces, its summary.json and the files of the traces."""
        names = ("seconds_per_step", "utilisation", "bubble")
        figures = {name: summary[name] for name in names}
        return {**figures, "ranks": describe(self.plan), "perfetto": [str(file) for file in files]}

    def tell_run(self, console: Console, figures: dict[str, Any]) -> None:
        """Print what happened in a run, from the figures."""
        for rank, words in enumerate(figures["ranks"]):
            say(console, f"rank {rank}: {words}")
        say(
            console, f"{figures['seconds_per_step'] * 1e3:.1f} ms a batch of all blocks, utilisation {figures['utilisation']:.1%}"
        )


@dataclass(frozen=True)
class BlockwisePlanner:
    """Plans blockwise training from a profile of the blocks, for batches of so many rows."""

    kind: ClassVar[Kind] = "blockwise"
    strategies: ClassVar[tuple[str, ...]] = tuple(BLOCKWISE_STRATEGIES)

    profile: BlockProfile
    batch: int

    @property
    def num_blocks(self) -> str:
        """The number of the profile's blocks, in words."""
        return f"{len(self.profile.blocks)} blocks"

    def make(self, options: SimulateOptions) -> BlockwiseReport:
        """Plan one strategy (default: balanced)."""
        return BlockwiseReport(make_blockwise_plan(
            self.profile, strategy=options.strategy or "balanced", devices=options.devices, batch=self.batch,
            memory_bytes=options.memory,
        ))  # fmt: skip

    def search(self, options: PlanningOptions, progress: Callable[[str], object]) -> SearchReport:
        """Plan every strategy, or only the one that the options name."""
        found = search_blockwise(
            self.profile, devices=options.devices, batch=self.batch, memory_bytes=options.memory, strategy=options.strategy
        )
        dp = next((one.plan for one in found.considered if one.name == "dp"), None)
        figures = {
            "kind": self.kind, "devices": options.devices, "batch": self.batch,
            "memory_limit_bytes": options.memory and int(options.memory),
            "limit_seconds_per_step": found.plan.limit_seconds_per_batch, "chosen": found.chosen.name,
            "considered": considered_figures(
                found, lambda plan: {**BlockwiseReport(plan).figures(), "speedup": _speedup(plan, dp)}
            ),
        }  # fmt: skip
        plan = blockwise_plan_to_json(found.plan, options.memory)
        keys = {"strategy": found.chosen.name}
        return SearchReport(figures, plan, keys, lambda console: self._tell_search(found, dp, console))

    def _tell_search(self, found: Search[BlockwisePlan], dp: BlockwisePlan | None, console: Console) -> None:
        def cells(plan: BlockwisePlan) -> list[str]:
            model, speedup = plan.cost_model_seconds_per_batch, _speedup(plan, dp)
            return [
                milliseconds(plan.seconds_per_batch), "" if model is None else milliseconds(model),
                "" if speedup is None else f"{speedup:.2f}", f"{plan.utilisation:.1%}", str(plan.window),
                shown_bytes(max(plan.memory_bytes)) if plan.memory_bytes else "",
            ]  # fmt: skip

        tell_considered(found, console, ("ms a batch", "model", "over dp", "busy", "window", "memory"), cells)
        for one in found.considered:
            if one.plan is not None and (one.plan.num_devices <= _FEW or one is found.chosen):
                say(console, f"{one.name}:")
                for line in BlockwiseReport(one.plan).ranks():
                    say(console, f"  {line}")
        chosen, limit = found.plan, found.plan.limit_seconds_per_batch
        reached = limit / chosen.seconds_per_batch if chosen.seconds_per_batch else 1.0
        say(
            console,
            f"Times are of training every block on one batch of {self.batch} rows. All work once, divided evenly, takes "
            f"{milliseconds(limit)} ms: no plan is faster, and {found.chosen.name} reaches {reached:.1%} of that. The model is "
            "Pipe-BD's cost model; 1:1/3 is a third of block 1's rows.",
        )

    def save(self, path: str) -> None:
        """Write the profile to a file."""
        self.profile.save(path)

    def figures(self, microbatches: int) -> dict[str, Any]:
        """Give the profile, for JSON."""
        profile = self.profile
        return {"batch": profile.batch, "blocks": [asdict(block) for block in profile.blocks], "link": profile.link.to_json()}

    def tell(self, console: Console, devices: int) -> None:
        """Print the profile, which was measured with `devices` processes."""
        profile = self.profile
        most = max(block.relative_standard_error for block in profile.blocks)
        say(
            console,
            f"milliseconds of a teacher block's forward + its student block's step, for parts of a batch of {profile.batch} "
            f"(standard error at most {most:.0%})",
        )
        for table in self._tables():
            table.show(console)
        sizes = profile.blocks[0].allreduce_ranks
        if sizes:
            say(console, "milliseconds that groups of ranks take longer for a student's step, to add up its gradients")
            table = FigureTable("block", *(f"{size} ranks" for size in sizes))
            for index, block in enumerate(profile.blocks):
                table.add_row(block_name(index, block.name), *map(milliseconds, block.allreduce_seconds))
            table.show(console)
        say(console, f"link: {shown_link(profile.link)}" if devices > 1 else NOT_MEASURED)

    def _tables(self) -> Iterator[FigureTable]:
        """Yield tables of the times at each number of rows, a few beside each other, and then a table of the bytes."""
        blocks = self.profile.blocks
        rows = blocks[0].rows[::-1]
        for start in range(0, len(rows), _SHOWN):
            shown = rows[start : start + _SHOWN]
            table = FigureTable("block", *(f"{count} rows" for count in shown))
            for index, block in enumerate(blocks):
                times = (f"{milliseconds(block.teacher(n))} + {milliseconds(block.student(n))}" for n in shown)
                table.add_row(block_name(index, block.name), *times)
            yield table
        table = FigureTable("block", "input a row", "parameters", "teacher", "student + state", "activations a row")
        for index, block in enumerate(blocks):
            table.add_row(block_name(index, block.name), *map(shown_bytes, (
                block.input_bytes_per_row, block.parameter_bytes, block.teacher_bytes, block.state_bytes,
                block.activation_bytes_per_row,
            )))  # fmt: skip
        yield table

    def compare(self, options: VirtualOptions, microbatches: int) -> Comparison:
        """Compare strategies on virtual devices, which wait for as long as the profile says."""
        from pipestill.compare.virtual import compare_virtual_blockwise

        return compare_virtual_blockwise(self.profile, options, batch=self.batch)


def _speedup(plan: BlockwisePlan, dp: BlockwisePlan | None) -> float | None:
    return dp.seconds_per_batch / plan.seconds_per_batch if dp is not None and plan.seconds_per_batch else None
