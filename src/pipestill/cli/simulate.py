"""`pipestill simulate PLAN|RECIPE ...` or `--uniform T,F,BI,BW`: time a schedule without running it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console
from rich.text import Text

from pipestill import draw
from pipestill.cli.figures import block_figures, milliseconds, pipeline_figures, stages_table, who_does_what
from pipestill.cli.measure import built, check_strategy, costs_for, drawable, load, recipe_of
from pipestill.cli.options import Helped, parse, refuse
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.plan import Plan, make_plan
from pipestill.plan.blockwise.describe import phase_titles
from pipestill.plan.blockwise.json import block_plan_from_json, is_block_plan
from pipestill.plan.blockwise.plan import BlockwisePlan, make_blockwise_plan
from pipestill.recipes.run_options import NumBytes, RunOptions
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.pipeline.structure import Demands

WITHOUT_RECIPE = ("teacher", "views", "batch_loss", "clip")
OF_PIPELINES = ("microbatches", "staleness", "split_backward", "stash", "run_ahead", "uniform", *WITHOUT_RECIPE)
OF_BLOCKS = ("batch",)
_FIXED = ("devices", "strategy", "costs", "estimate", "memory", *OF_PIPELINES, *OF_BLOCKS)


@dataclass(frozen=True)
class SimulateOptions:
    """What is simulated, and what is shown of it.

    Args:
        devices: pipeline stages, or ranks that train blocks
        strategy: sequential, gpipe, 1f1b, tspipe, async or fill for a pipeline; dp, ls, relay, relay-dpu, hybrid or balanced for
            blocks (default: fill, or balanced)
        microbatches: slices of a batch
        staleness: steps by which the weights of a momentum teacher under 'fill' may be old, 0 or 1 (default: 0)
        split_backward: let 'fill' compute gradients of weights apart from those of inputs
        stash: most microbatches that a rank of 'fill' holds between forward and backward: a number, n, 2n-1 or all (default: n,
            and 2n-1 with split backwards)
        run_ahead: most microbatches that the teacher of 'fill' may be ahead of the student (default: as many as help)
        uniform: without a recipe: T,F,BI,BW such as 1,1,1,1: the time that every stage takes for a teacher forward, a student
            forward, its input gradient and its weight gradient
        teacher: without a recipe: the teacher is frozen, a moving average (ema), or none for a student alone
        views: without a recipe: views of each sample, all seen by both models
        batch_loss: without a recipe: the loss takes the whole batch at once
        clip: without a recipe: gradients are clipped by their global norm
        costs: a file of costs, or a CSV of blocks; by itself, or with a recipe instead of measuring it
        batch: rows of a batch, with a CSV of blocks (default: the most that was measured)
        estimate: compute the costs of a pipeline for a device that is not here: v100, a100, h100 or h200, with :fp32, :bf16 or
            the like behind it for another precision than its usual one (default: measure costs here)
        memory: most memory that a device may hold, such as 80GB (default: no limit)
        draw: a .svg or .png file to draw the picture into (default: none)
        steps: steady steps in the picture (default: 2, or one window of batches)
        text: print the schedule too: the actions of each rank in order, with @1 behind those of the next step
        json: print the figures as one JSON object
    """

    devices: int = 2
    strategy: str | None = None
    microbatches: int = 8
    staleness: int | None = None
    split_backward: bool = False
    stash: int | str | None = None
    run_ahead: int | None = None
    uniform: str | None = None
    teacher: Literal["frozen", "ema", "none"] = "frozen"
    views: int = 1
    batch_loss: bool = False
    clip: bool = False
    costs: str | None = None
    batch: int | None = None
    estimate: str | None = None
    memory: NumBytes | None = None
    draw: str | None = None
    steps: int | None = None
    text: bool = False
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    source = words[0] if words and not words[0].startswith("--") else None
    try:
        plan, options, title = _plan(source, words[1:] if source else words)
    except Helped:
        return 0
    if isinstance(plan, BlockwisePlan):
        return _tell_of_blocks(plan, options, title)
    figures, trace, limit = pipeline_figures(plan), plan.prediction, plan.limit_seconds_per_step
    unit: draw.Unit = None if options.uniform else "s"
    if options.draw:
        draw.picture([trace], Path(options.draw), titles=[title], num_steps=_steps(options, 2), unit=unit)
        figures["picture"] = options.draw
    if options.json:
        print(json.dumps(figures))
        return 0
    console = Console()
    if options.text:
        console.print(draw.schedule_table(plan.schedule), highlight=False, markup=False, soft_wrap=True)
    coloured = draw.text(trace, width=console.width, colour=console.is_terminal, unit=unit)
    console.print(Text.from_ansi(coloured))
    step, least = (
        f"{x:g} time units" if unit is None else f"{x * 1e3:.2f} ms" for x in (trace.seconds_per_step, limit)
    )
    console.print(
        f"{title}: {step} a step (with this partition, no less than {least}), utilisation {trace.utilisation:.1%}; "
        f"the ranks stash at most {' '.join(map(str, trace.stash_peak))} microbatches, "
        f"the teacher is at most {plan.proof.run_ahead} ahead",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if plan.memory_bytes:
        console.print(stages_table(plan), crop=False)
    if plan.costs.source:
        console.print(f"costs {plan.costs.source}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _steps(options: SimulateOptions, usual: int) -> int:
    return usual if options.steps is None else options.steps


def _tell_of_blocks(plan: BlockwisePlan, options: SimulateOptions, title: str) -> int:
    """The same for blocks that learn alone."""
    figures = block_figures(plan)
    if options.draw:
        titles = [title] if len(plan.phases) == 1 else phase_titles(plan)
        steps = _steps(options, 1 if plan.window > 1 else 2)
        draw.picture(plan.predictions, Path(options.draw), titles=titles, num_steps=steps)
        figures["picture"] = options.draw
    if options.json:
        print(json.dumps(figures))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for phase, trace, name in zip(plan.phases, plan.predictions, phase_titles(plan), strict=True):
        if len(plan.phases) > 1:
            console.print(name)
        if options.text:
            console.print(draw.schedule_table(phase.schedule), markup=False)
        console.print(Text.from_ansi(draw.text(trace, width=console.width, colour=console.is_terminal)))
    for line in who_does_what(plan):
        console.print(line, markup=False)
    windows = f", in windows of {plan.window} batches" if plan.window > 1 else ""
    model = plan.cost_model_seconds_per_batch
    console.print(
        f"{title}: {milliseconds(plan.seconds_per_batch)} ms a batch of {plan.costs.batch} rows through all blocks{windows}"
        f"{'' if model is None else f' ({milliseconds(model)} by the cost model of Pipe-BD)'}, utilisation "
        f"{plan.utilisation:.1%}; all work once, shared out evenly, takes {milliseconds(plan.limit_seconds_per_batch)} ms"
    )
    return 0


def _plan(source: str | None, words: list[str]) -> tuple[Plan | BlockwisePlan, SimulateOptions, str]:
    """From a plan file, a recipe, a costs file or uniform stages."""
    if source is not None and source.endswith(".json"):
        (options,) = parse("simulate plan.json", words, SimulateOptions)
        refuse(words, _FIXED, f"is fixed by the plan '{source}'; leave it out, or name a recipe or --costs instead")
        try:
            text = Path(source).read_text()
            plan = block_plan_from_json(text) if is_block_plan(text) else Plan.from_json(text)
        except OSError as error:
            raise ConfigError(f"cannot read plan '{source}': {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"'{source}': the plan is not text") from None
        except ConfigError as error:
            raise ConfigError(f"'{source}': {error}") from None
        return plan, options, _title(plan)
    if source is not None:
        return _of_recipe([source, *words])
    (options,) = parse("simulate [RECIPE|config.yaml|plan.json]", words, SimulateOptions)
    refuse(words, ("estimate",), "is for a recipe's models; leave it out, or name a recipe")
    if (options.uniform is None) == (options.costs is None):
        raise ConfigError(
            "'simulate' needs one of: a recipe, a config.yaml, a plan.json, --costs FILE, or --uniform T,F,BI,BW"
        )
    costs = uniform(options.uniform, options) if options.uniform is not None else load(options.costs)
    demands = Demands()
    if not isinstance(costs, BlockProfile):
        costs, demands = without_recipe(costs, options)
    plan = _make(costs, demands, options, words)
    return plan, options, _title(plan)


def _of_recipe(words: list[str]) -> tuple[Plan | BlockwisePlan, SimulateOptions, str]:
    """Blocks are measured as a run does; a pipeline's in this process alone, over links that take no time."""
    recipe, options, rest = recipe_of("simulate", words, SimulateOptions)
    drawable(options.draw)
    refuse(rest, ("uniform", *WITHOUT_RECIPE), "is for stages without a recipe; leave it out, or leave out the recipe")
    workload = built(recipe)
    by_blocks = workload.kind == "blockwise"
    devices = max(1, options.devices) if by_blocks else 1
    how = RunOptions(devices=devices, microbatches=max(1, options.microbatches), split_backward=options.split_backward)
    costs, demands = costs_for(recipe, workload, options.costs, how, options.estimate)
    plan = _make(costs, demands, options, rest, workload.train_loader.batch_size)
    return plan, options, f"{recipe.name}: {_title(plan)}"


class Shape(Protocol):
    """What stages without a recipe are described by."""

    @property
    def devices(self) -> int: ...
    @property
    def teacher(self) -> str: ...
    @property
    def views(self) -> int: ...
    @property
    def batch_loss(self) -> bool: ...
    @property
    def clip(self) -> bool: ...


def without_recipe(costs: Costs, options: Shape) -> tuple[Costs, Demands]:
    """The costs of a task of that shape, and what it asks of a schedule; `ConfigError` when the costs are of another."""
    if options.views < 1:
        raise ConfigError(f"views is {options.views}; expected at least 1")
    if options.teacher == "ema" and not costs.teacher:
        raise ConfigError("--teacher ema needs costs of a teacher, and these have none")
    if len(costs.views) != options.views:
        raise ConfigError(f"the costs are of {len(costs.views)} views, --views is {options.views}")
    if options.teacher == "none":
        costs = dataclasses.replace(costs, teacher=())
    return costs, Demands(options.teacher == "ema", options.views, options.views, options.batch_loss, options.clip)


def uniform(times: str, options: Shape) -> Costs:
    """One block a stage, all alike."""
    try:
        teacher, forward, input_gradient, weight_gradient = (float(x) for x in times.split(","))
    except ValueError:
        raise ConfigError(f"--uniform takes four numbers T,F,BI,BW such as 1,1,1,1, got '{times}'") from None
    if min(teacher, forward, input_gradient, weight_gradient) < 0 or forward + input_gradient + weight_gradient == 0:
        raise ConfigError(f"--uniform takes times of 0 or more, and a student that takes time, got '{times}'")
    return Costs.uniform(
        max(1, options.devices), teacher, forward, input_gradient + weight_gradient, weight=weight_gradient,
        teacher=options.teacher != "none", views=max(1, options.views),
    )  # fmt: skip


def _make(
    costs: Costs | BlockProfile,
    demands: Demands,
    options: SimulateOptions,
    words: Sequence[str],
    batch: int | None = None,
) -> Plan | BlockwisePlan:
    """The plan for such costs; keys of the other kind of training on the command line are refused."""
    if options.strategy == "reference":
        raise ConfigError("'reference' is a plain loop without a schedule; there is nothing to simulate")
    if options.strategy is not None:
        check_strategy(options.strategy, costs)
    if isinstance(costs, BlockProfile):
        refuse(words, OF_PIPELINES, FOR_PIPELINES)
        return make_blockwise_plan(
            costs, strategy=options.strategy or "balanced", devices=options.devices,
            batch=rows_of_batch(costs, options.batch, batch), memory_bytes=options.memory,
        )  # fmt: skip
    refuse(words, OF_BLOCKS, FOR_BLOCKS)
    return make_plan(
        costs, devices=options.devices, strategy=options.strategy or "fill", microbatches=options.microbatches,
        run_ahead=options.run_ahead, staleness=options.staleness, split_backward=options.split_backward,
        stash=options.stash, demands=demands, memory_bytes=options.memory,
    )  # fmt: skip


FOR_PIPELINES = "is for pipelines, and these costs are of blocks that learn alone; leave it out"
FOR_BLOCKS = "is for blocks that learn alone (a .csv of blocks), and these costs are of a pipeline; leave it out"


def rows_of_batch(profile: BlockProfile, given: int | None, of_recipe: int | None) -> int:
    """Rows of a batch: as said, else the recipe's, else the most that the blocks were measured for."""
    if given is not None and of_recipe is not None and given != of_recipe:
        raise ConfigError(f"batch is {given}, and the recipe's batches have {of_recipe} rows; use its --batch_size")
    said = given if of_recipe is None else of_recipe
    return max(block.rows[-1] for block in profile.blocks) if said is None else said


def _title(plan: Plan | BlockwisePlan) -> str:
    if isinstance(plan, BlockwisePlan):
        return f"{plan.strategy}, {plan.num_devices} devices"
    knobs = [f"stash {plan.stash}"] if plan.stash is not None else []
    knobs += ["split backward"] if plan.split_backward else []
    knobs += [f"staleness {plan.staleness}"] if plan.staleness is not None else []
    return ", ".join([plan.strategy, *knobs, f"{plan.num_devices} devices", f"{plan.microbatches} microbatches"])
