"""`pipestill profile RECIPE -o FILE`: what every block costs, and the links between devices."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipestill.busy import Busy
from pipestill.cli.figures import milliseconds, plain_table, shown_bytes, wide_console
from pipestill.cli.measure import CSV, built, measured, recipe_of, writable, write_json
from pipestill.cli.options import Helped
from pipestill.costs import BlockCosts, Costs, Link
from pipestill.errors import ConfigError
from pipestill.model.devices import Machine
from pipestill.recipes.estimate import compute
from pipestill.recipes.recipe import Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.schedule.blockwise.profile import BlockProfile


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, and where it goes.

    Args:
        out: the file to write, also -o: a .json of costs, or a .csv of blocks for a recipe that trains block by block; --costs of
            other commands takes either (default: none)
        estimate: compute the costs of a pipeline for a device that is not here: v100, a100, h100 or h200, with :fp32, :bf16 or
            the like behind it for another precision than its usual one (default: measure costs here)
        devices: processes with which the links between them, and how much they slow each other down, are measured; blocks are
            measured with the rows that 1 to this many ranks would have of a batch
        microbatches: slices of a batch; costs of a pipeline are for one slice
        device: cpu or cuda, between which links are measured (default: cuda where there are enough devices); blocks are measured
            on the CPU, as before a run
        seed: seed of the initial weights and of the order of the data
        threads: CPU threads of each process that measures (default: the cores, divided evenly)
        timeout_seconds: deadline of every wait, in seconds
        json: print what was measured as one JSON object
    """

    out: str | None = None
    estimate: str | None = None
    devices: int = 1
    microbatches: int = 8
    device: str | None = None
    seed: int = 0
    threads: int | None = None
    timeout_seconds: float = 600.0
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    try:
        recipe, options, _ = recipe_of("profile", words, ProfileOptions)
    except Helped:
        return 0
    if options.devices < 1 or options.microbatches < 1:
        raise ConfigError(
            f"devices {options.devices} and microbatches {options.microbatches}; expected at least 1 each"
        )
    workload = built(recipe, options.seed)
    by_blocks = workload.kind == "blockwise"
    _check_file(options.out, recipe.name, by_blocks)
    how = RunOptions(
        devices=options.devices, microbatches=options.microbatches, split_backward=not by_blocks, device=options.device,
        seed=options.seed, threads=options.threads, timeout_seconds=options.timeout_seconds,
    )  # fmt: skip
    costs = measured(recipe, how) if options.estimate is None else _computed(workload, options, how)
    figures: dict[str, Any] = {"recipe": recipe.name, "devices": options.devices, "file": options.out}
    if isinstance(costs, BlockProfile):
        blocks = [asdict(block) for block in costs.blocks]
        figures |= {"batch": costs.batch, "blocks": blocks, "link": costs.link.to_json()}
    else:
        figures |= {"microbatches": options.microbatches, "costs": costs.to_json()}
    if options.out is not None:
        if isinstance(costs, BlockProfile):
            costs.save(options.out)
        else:
            write_json(options.out, costs.to_json())
    if options.json:
        print(json.dumps(figures, allow_nan=False))
        return 0
    console = wide_console()
    if isinstance(costs, BlockProfile):
        tell_of_blocks(costs, options.devices, console)
    else:
        tell(costs, options.devices, console)
    if options.out is not None:
        console.print(f"written to {options.out}")
    return 0


def _computed(workload: Workload, options: ProfileOptions, how: RunOptions) -> Costs:
    assert options.estimate is not None
    if options.devices > 1:
        raise ConfigError(
            "--devices starts processes that measure, and --estimate measures nothing; leave one of them out"
        )
    with Busy(f"computing costs for {options.estimate}"):
        return compute(workload, Machine.parse(options.estimate), how)[0]


def _check_file(path: str | None, recipe: str, by_blocks: bool) -> None:
    suffix = CSV if by_blocks else ".json"
    if path is not None and Path(path).suffix.lower() != suffix:
        what = "blocks that learn alone" if by_blocks else "pipelines"
        raise ConfigError(f"cannot write '{path}': recipe '{recipe}' is of {what}, so the name must end in {suffix}")
    writable(path)


def tell(costs: Costs, devices: int, console: Console) -> None:
    """Costs of a pipeline's blocks, for a person."""
    median = "" if costs.source.startswith("computed") else ", median"
    console.print(f"milliseconds of one microbatch of {costs.rows} rows{median}; update once a batch")
    table = plain_table("block", "forward", "backward", "of weights", "update", "parameters", "output", "stash")
    for role, blocks in (("teacher", costs.teacher), ("student", costs.student)):
        for index, block in enumerate(blocks):
            table.add_row(f"{role} {_name(index, block.name)}", *_cells(block, role == "student"))
    console.print(table, crop=False)
    views = f"; views take {', '.join(f'{v:.2f}' for v in costs.views)} of it" if len(costs.views) > 1 else ""
    console.print(f"loss {milliseconds(costs.loss_seconds)} ms{views}")
    if costs.source.startswith("computed"):
        console.print(f"costs {costs.source}", markup=False)
    elif devices > 1:
        console.print(
            f"link: {_link(costs.link)}, and {milliseconds(costs.link.wake_seconds)} ms more after a wait; a message "
            f"keeps either end for {milliseconds(costs.link.handling_seconds)} ms; while all {devices} processes compute, "
            f"work takes {costs.interference:.2f} times as long"
        )
    else:
        console.print(_ALONE)


_ALONE = "links were not measured: one process has none, and --devices N starts more"


def _cells(block: BlockCosts, trains: bool) -> list[str]:
    own = (block.backward_seconds, block.weight_seconds, block.update_seconds)
    learnt = [milliseconds(seconds) if trains else "" for seconds in own]
    return [
        milliseconds(block.forward_seconds), *learnt, shown_bytes(block.parameter_bytes), shown_bytes(block.output_bytes),
        shown_bytes(block.stash_bytes) if trains else "",
    ]  # fmt: skip


def _name(index: int, name: str) -> str:
    return name if name == str(index) else f"{index}: {name}"


def _link(link: Link) -> str:
    return f"{link.latency_seconds * 1e6:.0f} us, then {link.bytes_per_second / 1e9:.3g} GB/s"


def tell_of_blocks(profile: BlockProfile, devices: int, console: Console) -> None:
    """Times of blocks that learn alone, for a person."""
    most = max(block.relative_standard_error for block in profile.blocks)
    console.print(
        f"milliseconds of a teacher block's forward + its student block's step, for parts of a batch of {profile.batch} "
        f"(standard error at most {most:.0%})"
    )
    for table in _tables(profile):
        console.print(table, crop=False)
    sizes = profile.blocks[0].allreduce_ranks
    if sizes:
        console.print("milliseconds that groups of ranks take longer for a student's step, to add up its gradients")
        table = plain_table("block", *(f"{size} ranks" for size in sizes))
        for index, block in enumerate(profile.blocks):
            table.add_row(_name(index, block.name), *map(milliseconds, block.allreduce_seconds))
        console.print(table, crop=False)
    console.print(f"link: {_link(profile.link)}" if devices > 1 else _ALONE)


_SHOWN = 5  # row counts of one table


def _tables(profile: BlockProfile) -> list[Table]:
    """Times at each share, a few shares beside each other, and then the bytes."""
    rows = profile.blocks[0].rows[::-1]
    tables = []
    for start in range(0, len(rows), _SHOWN):
        shown = rows[start : start + _SHOWN]
        table = plain_table("block", *(f"{count} rows" for count in shown))
        for index, block in enumerate(profile.blocks):
            times = (f"{milliseconds(block.teacher(n))} + {milliseconds(block.student(n))}" for n in shown)
            table.add_row(_name(index, block.name), *times)
        tables.append(table)
    table = plain_table("block", "input a row", "parameters", "teacher", "student, with its state", "activations a row")
    for index, block in enumerate(profile.blocks):
        table.add_row(_name(index, block.name), *map(shown_bytes, (
            block.input_bytes_per_row, block.parameter_bytes, block.teacher_bytes, block.state_bytes,
            block.activation_bytes_per_row,
        )))  # fmt: skip
    return [*tables, table]
