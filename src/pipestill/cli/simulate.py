"""`pipestill simulate PLAN|RECIPE ...` or `--uniform T,F,BI,BW`: time a schedule without running it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.text import Text

from pipestill import draw
from pipestill.cli.options import Helped, parse, refuse
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.plan import Plan, make_plan
from pipestill.schedule import check
from pipestill.schedule.program import Demands

_WITHOUT_RECIPE = ("uniform", "teacher", "views", "batch_loss", "clip")
_FIXED = (
    "devices", "strategy", "microbatches", "staleness", "split_backward", "stash", "run_ahead", "costs", *_WITHOUT_RECIPE,
)  # fmt: skip


@dataclass(frozen=True)
class SimulateOptions:
    """What is simulated, and what is shown of it.

    Args:
        devices: pipeline stages
        strategy: sequential, gpipe, 1f1b, tspipe, async or fill
        microbatches: slices of a batch
        staleness: of a momentum teacher under 'fill': 0 or 1
        split_backward: 'fill' takes gradients of weights apart from those of inputs
        stash: most microbatches that a rank of 'fill' holds: a number, n, 2n-1 or all
        run_ahead: most microbatches that the teacher of 'fill' may be ahead of the student
        uniform: T,F,BI,BW such as 1,1,1,1: what every stage takes for a teacher forward, a student forward,
            its input gradient and its weight gradient
        teacher: without a recipe: frozen, ema, or none for the student alone
        views: without a recipe: views of each sample, all seen by both models
        batch_loss: without a recipe: the loss takes the whole batch at once
        clip: without a recipe: gradients are clipped by their global norm
        costs: a costs file, alone or to spare measuring a recipe
        draw: a .svg or .png file for the picture
        steps: steady steps in the picture
        text: print the schedule too: each rank's work in order, with @1 after work for the step after
        json: print the figures as one JSON object
    """

    devices: int = 2
    strategy: str = "fill"
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
    draw: str | None = None
    steps: int = 2
    text: bool = False
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    source = words[0] if words and not words[0].startswith("--") else None
    try:
        plan, options, title = _plan(source, words[1:] if source else words)
    except Helped:
        return 0
    proof = check(plan.schedule)
    trace = plan.prediction
    limit = plan.limit_seconds_per_step
    figures: dict[str, Any] = {
        "strategy": plan.strategy,
        "devices": plan.num_devices,
        "microbatches": plan.microbatches,
        "seconds_per_step": trace.seconds_per_step,
        "limit_seconds_per_step": limit,
        "utilisation": round(trace.utilisation, 3),
        "bubble": round(trace.bubble, 3),
        "stash_peak": list(trace.stash_peak),
        "run_ahead": proof.run_ahead,
        "staleness": proof.staleness,
        "student_partition": list(plan.student_partition),
        "teacher_partition": list(plan.teacher_partition),
    }
    unit: draw.Unit = None if options.uniform else "s"
    if options.draw:
        draw.picture([trace], Path(options.draw), titles=[title], num_steps=options.steps, unit=unit)
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
        f"the teacher is at most {proof.run_ahead} ahead",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _plan(source: str | None, words: list[str]) -> tuple[Plan, SimulateOptions, str]:
    """From a plan file, a recipe, a costs file or uniform stages."""
    if source is not None and source.endswith(".json"):
        (options,) = parse("simulate plan.json", words, SimulateOptions)
        refuse(words, _FIXED, f"is fixed by the plan '{source}'; leave it out, or name a recipe or --costs instead")
        try:
            plan = Plan.from_json(Path(source).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read plan '{source}': {error.strerror}") from None
        except ConfigError as error:
            raise ConfigError(f"'{source}': {error}") from None
        return plan, options, _title(plan)
    if source is not None:
        from pipestill.cli.measure import costs_of_recipe

        recipe_costs, demands, options = costs_of_recipe("simulate", [source, *words], SimulateOptions)
        refuse(words, _WITHOUT_RECIPE, "is for stages without a recipe; leave it out, or leave out the recipe")
        plan = _make(recipe_costs, demands, options)
        return plan, options, f"{source}: {_title(plan)}"
    (options,) = parse("simulate [RECIPE|config.yaml|plan.json]", words, SimulateOptions)
    if (options.uniform is None) == (options.costs is None):
        raise ConfigError(
            "'simulate' needs one of: a recipe, a config.yaml, a plan.json, --costs FILE, or --uniform T,F,BI,BW"
        )
    costs = uniform(options.uniform, options) if options.uniform is not None else Costs.load(options.costs)
    plan = _make(costs, without_recipe(costs, options), options)
    return plan, options, _title(plan)


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


def without_recipe(costs: Costs, options: Shape) -> Demands:
    """What a task of that shape asks of a schedule; `ConfigError` when the costs are of another."""
    if options.views < 1:
        raise ConfigError(f"views is {options.views}; expected at least 1")
    if options.teacher == "ema" and not costs.teacher:
        raise ConfigError("--teacher ema needs costs of a teacher, and these have none")
    if len(costs.views) != options.views:
        raise ConfigError(f"the costs are of {len(costs.views)} views, --views is {options.views}")
    return Demands(options.teacher == "ema", options.views, options.views, options.batch_loss, options.clip)


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


def _make(costs: Costs, demands: Demands, options: SimulateOptions) -> Plan:
    if options.strategy == "reference":
        raise ConfigError("'reference' is a plain loop without a schedule; there is nothing to simulate")
    return make_plan(
        costs, devices=options.devices, strategy=options.strategy, microbatches=options.microbatches,
        run_ahead=options.run_ahead, staleness=options.staleness, split_backward=options.split_backward,
        stash=options.stash, demands=demands,
    )  # fmt: skip


def _title(plan: Plan) -> str:
    knobs = [f"stash {plan.stash}"] if plan.stash is not None else []
    knobs += ["split backward"] if plan.split_backward else []
    knobs += [f"staleness {plan.staleness}"] if plan.staleness is not None else []
    return ", ".join([plan.strategy, *knobs, f"{plan.num_devices} devices", f"{plan.microbatches} microbatches"])
