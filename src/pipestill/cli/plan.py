"""`pipestill plan RECIPE --devices N -o plan.json`: every strategy that could train it, timed, and the fastest one."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from pipestill.busy import Busy
from pipestill.cli.figures import (
    block_figures,
    milliseconds,
    pipeline_figures,
    plain_table,
    shown_bytes,
    stages_table,
    who_does_what,
    wide_console,
)
from pipestill.cli.measure import built, check_strategy, costs_for, load, recipe_of, writable, write_json
from pipestill.cli.options import Helped, parse, refuse
from pipestill.cli.simulate import FOR_BLOCKS, FOR_PIPELINES, OF_BLOCKS, WITHOUT_RECIPE, rows_of_batch, without_recipe
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.plan import Plan
from pipestill.plan.blockwise.json import blockwise_plan_to_json
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.plan.search import Considered, Search, search_blockwise, search_pipelines
from pipestill.recipes.run_options import NumBytes, RunOptions
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.pipeline.structure import Demands


@dataclass(frozen=True)
class PlanOptions:
    """What is planned for, and where the plan goes.

    Args:
        out: the file to write the plan to, also -o, for 'pipestill simulate' (default: none)
        devices: pipeline stages, or ranks that train blocks
        strategy: consider only this strategy, with its variants; read from the command line alone (default: all)
        microbatches: slices of a batch
        staleness: 1 to also consider strategies whose momentum teacher is one step old (default: 0)
        costs: a file of costs, or a CSV of blocks; by itself, or with a recipe instead of measuring it
        batch: rows of a batch, with a CSV of blocks (default: the most that was measured)
        estimate: compute the costs of a pipeline for a device that is not here: v100, a100, h100 or h200, with :fp32, :bf16 or
            the like behind it for another precision than its usual one (default: measure costs here)
        memory: most memory that a device may hold, such as 80GB (default: no limit)
        teacher: without a recipe: the teacher is frozen, a moving average (ema), or none for a student alone
        views: without a recipe: views of each sample, all seen by both models
        batch_loss: without a recipe: the loss takes the whole batch at once
        clip: without a recipe: gradients are clipped by their global norm
        device: cpu or cuda, between which links are measured (default: cuda where there are enough devices)
        threads: CPU threads of each process that measures (default: the cores, divided evenly)
        json: print everything that was considered as one JSON object
    """

    out: str | None = None
    devices: int = 2
    strategy: str | None = None
    microbatches: int = 8
    staleness: int | None = None
    costs: str | None = None
    batch: int | None = None
    estimate: str | None = None
    memory: NumBytes | None = None
    teacher: Literal["frozen", "ema", "none"] = "frozen"
    views: int = 1
    batch_loss: bool = False
    clip: bool = False
    device: str | None = None
    threads: int | None = None
    json: bool = False


@dataclass(frozen=True)
class _Problem:
    """What a plan is searched for. Of a recipe: its name, and the rows of its batches."""

    costs: Costs | BlockProfile
    demands: Demands
    recipe: str | None = None
    batch: int | None = None


def run(words: list[str]) -> int:
    """Run the command."""
    source = words[0] if words and not words[0].startswith("-") else None
    try:
        problem, options = _of_recipe(words) if source is not None else _of_file(words)
    except Helped:
        return 0
    if options.strategy is not None:
        check_strategy(options.strategy.split("+")[0], problem.costs)
    if isinstance(problem.costs, BlockProfile):
        refuse(words, ("microbatches", "staleness", *WITHOUT_RECIPE), FOR_PIPELINES)
        batch = rows_of_batch(problem.costs, options.batch, problem.batch)
        return _blocks(problem.costs, batch, options, problem.recipe)
    refuse(words, OF_BLOCKS, FOR_BLOCKS)
    return _pipelines(problem.costs, problem.demands, options, problem.recipe)


def _of_recipe(words: list[str]) -> tuple[_Problem, PlanOptions]:
    recipe, options, rest = recipe_of("plan", words, PlanOptions, asked_for=("strategy",))
    refuse(rest, WITHOUT_RECIPE, "is for costs without a recipe; leave it out")
    file = _file(options)
    if file is not None:
        refuse(rest, ("device", "threads"), f"is for measuring, and '{file}' is given; leave it out")
    workload = built(recipe)
    how = RunOptions(
        devices=max(1, options.devices), microbatches=max(1, options.microbatches),
        split_backward=workload.kind == "pipeline", device=options.device, threads=options.threads,
    )  # fmt: skip
    costs, demands = costs_for(recipe, workload, file, how, options.estimate)
    return _Problem(costs, demands, recipe.name, workload.train_loader.batch_size), options


def _of_file(words: list[str]) -> tuple[_Problem, PlanOptions]:
    (options,) = parse("plan [RECIPE|config.yaml]", words, PlanOptions)
    refuse(words, ("device", "threads"), "is for measuring a recipe; leave it out")
    refuse(words, ("estimate",), "is for a recipe's models; leave it out, or name a recipe instead of --costs")
    file = _file(options)
    if file is None:
        raise ConfigError("'plan' needs one of: a recipe, a config.yaml, or --costs FILE (.json, or .csv of blocks)")
    costs = load(file)
    if isinstance(costs, BlockProfile):
        return _Problem(costs, Demands()), options
    return _Problem(*without_recipe(costs, options)), options


def _file(options: PlanOptions) -> str | None:
    """The file of costs, once all that can be wrong with names of files has been looked at."""
    if options.out is not None and not options.out.endswith(".json"):
        raise ConfigError(f"cannot write '{options.out}': a plan's name must end in .json")
    writable(options.out)
    return options.costs


# ---------------------------------------------------------------- pipelines


def _pipelines(costs: Costs, demands: Demands, options: PlanOptions, recipe: str | None) -> int:
    with Busy("planning") as note:
        found = search_pipelines(
            costs, demands, devices=options.devices, microbatches=options.microbatches, staleness=options.staleness,
            strategy=options.strategy, memory_bytes=options.memory, progress=lambda name: note.change(f"planning {name}"),
        )  # fmt: skip
        figures = {
            "kind": "pipeline", "recipe": recipe, "devices": options.devices, "microbatches": options.microbatches,
            "rows": costs.rows, "costs": costs.source,
            "memory_limit_bytes": None if options.memory is None else int(options.memory),
            "chosen": found.chosen.name, "considered": [_of_pipeline(o, found) for o in found.considered],
            "file": options.out,
        }  # fmt: skip
    if options.out is not None:
        write_json(options.out, found.plan.to_json())
    if options.json:
        print(json.dumps(figures, allow_nan=False))
        return 0
    console = wide_console()
    console.print(_table_of_pipelines(found), crop=False)
    _tell_refused(found.considered, console)
    plan = found.plan
    console.print(stages_table(plan), crop=False)
    if costs.source:
        console.print(f"costs {costs.source}", markup=False)
    console.print(
        f"{found.chosen.name}: blocks of the stages, student {_listed(plan.student_partition)}"
        f"{f', teacher {_listed(plan.teacher_partition)}' if plan.teacher_partition else ''}. A step is "
        f"{options.microbatches} microbatches of {costs.rows} rows; with this partition none takes less than "
        f"{milliseconds(plan.limit_seconds_per_step)} ms. Stash is in units (a microbatch in one view) of the rank that "
        "holds most; stale is how many steps old the weights are that a step reads."
    )
    keys = [f"--strategy {plan.strategy}"] + ["--split_backward"] * plan.split_backward
    keys += [f"--stash {plan.stash}"] * (plan.stash is not None) + [f"--staleness {plan.staleness}"] * bool(
        plan.staleness
    )
    keys.append(f"--microbatches {options.microbatches}")
    if found.chosen.repartitioned:
        keys.append(f"--student_partition {_listed(plan.student_partition)}")
        keys.append(f"--teacher_partition {_listed(plan.teacher_partition)}")
    _tell_how_to_go_on(recipe, options, keys, "costs", console)
    return 0


def _of_pipeline(one: Considered[Plan], found: Search[Plan]) -> dict[str, Any]:
    if one.plan is None:
        return {"name": one.name, "chosen": False, "refused": one.refused}
    knobs = {"split_backward": one.plan.split_backward, "stash": one.plan.stash}
    return {"name": one.name, "chosen": one is found.chosen, **pipeline_figures(one.plan), **knobs}


def _table_of_pipelines(found: Search[Plan]) -> Any:
    table = plain_table("strategy", "ms a step", "busy", "stash", "stale", "memory", "")
    for one in found.considered:
        if one.plan is None:
            table.add_row(one.name, "", "", "", "", "", "refused")
            continue
        table.add_row(
            one.name, milliseconds(one.plan.prediction.seconds_per_step), f"{one.plan.prediction.utilisation:.1%}",
            str(max(one.plan.proof.stash_peak)), str(one.plan.proof.staleness),
            shown_bytes(max(one.plan.memory_bytes)) if one.plan.memory_bytes else "", _mark(one, found),
        )  # fmt: skip
    return table


def _listed(partition: tuple[int, ...]) -> str:
    return ",".join(map(str, partition))


# ---------------------------------------------------------------- blocks that learn alone


def _blocks(profile: BlockProfile, batch: int, options: PlanOptions, recipe: str | None) -> int:
    with Busy("planning"):
        found = search_blockwise(
            profile, devices=options.devices, batch=batch, memory_bytes=options.memory, strategy=options.strategy
        )
    dp = next((one.plan for one in found.considered if one.name == "dp"), None)
    figures = {
        "kind": "blockwise", "recipe": recipe, "devices": options.devices, "batch": batch,
        "memory_limit_bytes": None if options.memory is None else int(options.memory),
        "limit_seconds_per_step": found.plan.limit_seconds_per_batch, "chosen": found.chosen.name,
        "considered": [_of_block_plan(one, found, dp) for one in found.considered], "file": options.out,
    }  # fmt: skip
    if options.out is not None:
        write_json(options.out, blockwise_plan_to_json(found.plan, options.memory))
    if options.json:
        print(json.dumps(figures, allow_nan=False))
        return 0
    console = wide_console()
    console.print(_table_of_blocks(found, dp), crop=False)
    _tell_refused(found.considered, console)
    for one in found.considered:
        if one.plan is not None and (options.devices <= _FEW or one is found.chosen):
            console.print(f"{one.name}:")
            for line in who_does_what(one.plan):
                console.print(f"  {line}", markup=False)
    limit = found.plan.limit_seconds_per_batch
    reached = limit / found.plan.seconds_per_batch if found.plan.seconds_per_batch else 1.0
    console.print(
        f"Times are of training every block on one batch of {batch} rows. All work once, shared out evenly, takes "
        f"{milliseconds(limit)} ms: no plan is faster, and {found.chosen.name} reaches {reached:.1%} of that. The cost model "
        "is Pipe-BD's; 1:1/3 is a third of block 1's rows."
    )
    keys = [f"--strategy {found.chosen.name}"] + [f"--memory {options.memory}"] * (options.memory is not None)
    _tell_how_to_go_on(recipe, options, keys, "profile", console)
    return 0


_FEW = 8  # ranks of which every strategy's work is told; above, the chosen one's


def _of_block_plan(one: Considered[BlockwisePlan], found: Search[BlockwisePlan], dp: BlockwisePlan | None) -> dict[str, Any]:
    if one.plan is None:
        return {"name": one.name, "chosen": False, "refused": one.refused}
    speedup = _speedup(one.plan, dp)
    return {"name": one.name, "chosen": one is found.chosen, **block_figures(one.plan), "speedup": speedup}


def _speedup(plan: BlockwisePlan, dp: BlockwisePlan | None) -> float | None:
    return dp.seconds_per_batch / plan.seconds_per_batch if dp is not None and plan.seconds_per_batch else None


def _table_of_blocks(found: Search[BlockwisePlan], dp: BlockwisePlan | None) -> Any:
    table = plain_table("strategy", "ms a batch", "cost model", "over dp", "busy", "window", "memory", "")
    for one in found.considered:
        plan = one.plan
        if plan is None:
            table.add_row(one.name, "", "", "", "", "", "", "refused")
            continue
        model, speedup = plan.cost_model_seconds_per_batch, _speedup(plan, dp)
        table.add_row(
            one.name, milliseconds(plan.seconds_per_batch), "" if model is None else milliseconds(model),
            "" if speedup is None else f"{speedup:.2f}", f"{plan.utilisation:.1%}", str(plan.window),
            shown_bytes(max(plan.memory_bytes)) if plan.memory_bytes else "", _mark(one, found),
        )  # fmt: skip
    return table


# ---------------------------------------------------------------- both


def _mark(one: Considered[Any], found: Search[Any]) -> str:
    return "<- chosen" if one is found.chosen else ""


def _tell_refused(considered: tuple[Considered[Any], ...], console: Console) -> None:
    for one in considered:
        if one.refused:
            console.print(f"{one.name}: {one.refused}", markup=False)


def _tell_how_to_go_on(
    recipe: str | None, options: PlanOptions, keys: list[str], file_key: str, console: Console
) -> None:
    """Where the plan is, and what trains by it."""
    if options.out is not None:
        console.print(f"written to {options.out}; 'pipestill simulate {shlex.quote(options.out)}' draws it")
    if recipe is None:
        return
    # A plan holds the costs of a pipeline, from which training finds the same plan again.
    file = options.costs or (options.out if file_key == "costs" else None)
    given = [f"--costs {shlex.quote(file)}"] if file is not None else []
    console.print(f"pipestill train {recipe} --devices {options.devices} {' '.join([*keys, *given])}")
