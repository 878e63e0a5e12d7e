"""`pipestill simulate PLAN|RECIPE ...` or `--uniform T,F,BI,BW`: time a schedule without running it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from pipestill import draw
from pipestill.cli.options import Helped, parse, refuse
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.plan import Plan, make_plan
from pipestill.schedule import check

_FIXED = ("devices", "strategy", "microbatches", "run_ahead", "uniform", "teacher", "costs")


@dataclass(frozen=True)
class SimulateOptions:
    """What is simulated, and what is shown of it.

    Args:
        devices: pipeline stages
        strategy: sequential, gpipe, 1f1b or fill
        microbatches: slices of a batch
        run_ahead: most microbatches that the teacher of 'fill' may be ahead of the student
        uniform: T,F,BI,BW such as 1,1,1,1: what every stage takes for a teacher forward, a student forward,
            its input gradient and its weight gradient
        teacher: with --uniform: frozen, or none for the student alone
        costs: a costs file, alone or to spare measuring a recipe
        draw: a .svg or .png file for the picture
        steps: steady steps in the picture
        text: print the schedule too: each rank's work in order, with @1 after work for the step after
        json: print the figures as one JSON object
    """

    devices: int = 2
    strategy: str = "fill"
    microbatches: int = 8
    run_ahead: int | None = None
    uniform: str | None = None
    teacher: Literal["frozen", "none"] = "frozen"
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

        recipe_costs, options = costs_of_recipe("simulate", [source, *words], SimulateOptions)
        refuse(words, ("uniform", "teacher"), "is for stages without a recipe; leave it out, or leave out the recipe")
        plan = _make(recipe_costs, options)
        return plan, options, f"{source}: {_title(plan)}"
    (options,) = parse("simulate [RECIPE|config.yaml|plan.json]", words, SimulateOptions)
    if (options.uniform is None) == (options.costs is None):
        raise ConfigError(
            "'simulate' needs one of: a recipe, a config.yaml, a plan.json, --costs FILE, or --uniform T,F,BI,BW"
        )
    if options.costs is not None:
        refuse(words, ("teacher",), "goes with --uniform; the costs say whether there is a teacher")
    costs = uniform(options) if options.uniform is not None else Costs.load(options.costs)
    plan = _make(costs, options)
    return plan, options, _title(plan)


def uniform(options: SimulateOptions) -> Costs:
    """One block a stage, all alike."""
    assert options.uniform is not None
    try:
        teacher, forward, input_gradient, weight_gradient = (float(x) for x in options.uniform.split(","))
    except ValueError:
        raise ConfigError(f"--uniform takes four numbers T,F,BI,BW such as 1,1,1,1, got '{options.uniform}'") from None
    if min(teacher, forward, input_gradient, weight_gradient) < 0 or forward + input_gradient + weight_gradient == 0:
        raise ConfigError(f"--uniform takes times of 0 or more, and a student that takes time, got '{options.uniform}'")
    backward = input_gradient + weight_gradient
    return Costs.uniform(max(1, options.devices), teacher, forward, backward, teacher=options.teacher == "frozen")


def _make(costs: Costs, options: SimulateOptions) -> Plan:
    if options.strategy == "reference":
        raise ConfigError("'reference' is a plain loop without a schedule; there is nothing to simulate")
    return make_plan(
        costs, devices=options.devices, strategy=options.strategy, microbatches=options.microbatches,
        run_ahead=options.run_ahead,
    )  # fmt: skip


def _title(plan: Plan) -> str:
    return f"{plan.strategy}, {plan.num_devices} devices, {plan.microbatches} microbatches"
