"""`profile`, `plan` and `simulate` of files: what they write, print, and refuse."""

from __future__ import annotations

import json
import shlex
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from support.pairwise import every_other

from pipestill.cli import main
from pipestill.cli.figures import milliseconds, shown_bytes
from pipestill.cli.options import parse
from pipestill.cli.train import Output
from pipestill.costs import Costs
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.soft_target import SoftTarget
from pipestill.runtime.world import OneProcess
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

BLOCKS = BlockProfile(
    tuple(
        BlockTimes(f"stage {i}", (16, 32, 64), (0.01 * n, 0.02 * n, 0.03 * n), (0.03 * n, 0.05 * n, 0.09 * n), 4096, 10**5,
                   10**6, 3 * 10**6, 2 * 10**4)
        for i, n in enumerate((3, 1, 2, 1))
    )
)  # fmt: skip
OTHER_BLOCKS = "block,rows,teacher_forward_seconds,student_step_seconds,input_bytes_per_row,parameter_bytes\n0,8,0.1,0.2,8,8\n"
pytestmark = pytest.mark.usefixtures("quick_plans")

SMALL = ["--teacher_width", "4", "--teacher_depth", "2", "--batch_size", "64"]
TINY = ["--widths", "4,6", "--depths", "1,1", "--student_depths", "1,1", "--batch_size", "16"]


@pytest.fixture(autouse=True)
def _in_a_directory_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("costs.json").write_text(json.dumps(Costs.uniform(4, 0.01, 0.01, 0.02, weight=0.01).to_json()))
    BLOCKS.save("blocks.csv")
    Path("other.csv").write_text(OTHER_BLOCKS)


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    status = main(words.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def figures(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    def standard(constant: str) -> None:
        raise AssertionError(f"'{constant}' is not JSON")

    status, out, err = run(capsys, f"{words} --json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out, parse_constant=standard)
    return found


WRONG = {
    "nothing to plan": ("plan", "'plan' needs one of: a recipe"),
    "missing costs": ("plan --costs c.json", "cannot read costs file 'c.json'"),
    "missing profile": ("plan --costs b.csv", "cannot read block profile 'b.csv'"),
    "old name of costs": ("plan --profile blocks.csv", "--profile is part of --costs now"),
    "plan of another name": ("plan --costs costs.json -o plan.txt", "a plan's name must end in .json"),
    "plan into nowhere": ("plan --costs costs.json -o no/plan.json", "there is no directory 'no'"),
    "too many devices": ("plan --costs costs.json --devices 5", "4 blocks for 5 devices"),
    "no devices": ("plan --costs blocks.csv --devices 0", "0 devices; expected at least 1"),
    "empty batch": ("plan --costs blocks.csv --batch 0", "a batch of 0 rows"),
    "nearest pipeline": ("plan --costs costs.json --strategy fil+split", "no strategy 'fil' (did you mean 'fill'?)"),
    "nearest of blocks": ("plan --costs blocks.csv --strategy hybrd", "no strategy 'hybrd' (did you mean 'hybrid'?)"),
    "strategy of blocks": ("plan --costs costs.json --strategy relay", "'relay' is of blockwise training"),
    "strategy of pipelines": ("plan --costs blocks.csv --strategy gpipe", "'gpipe' is of pipelines"),
    "memory of a pipeline": ("plan --costs costs.json --memory 1GB", "these costs do not tell what blocks hold in memory"),
    "knobs of pipelines": (
        "plan --costs blocks.csv --microbatches 2 --views 2",
        "--microbatches is for pipelines, and these costs are of blockwise training",
    ),
    "memory in words": ("plan --costs blocks.csv --memory big", "memory takes an amount such as 80GB or 512MiB, got 'big'"),
    "memory that nothing fits into": ("plan --costs blocks.csv --memory 1KB", "fits into 0.000953674 MiB"),
    "memory that is not known": ("plan --costs other.csv --memory 1GB", "does not say what blocks hold in memory"),
    "staleness of a frozen teacher": ("plan --costs costs.json --staleness 1", "staleness is of a momentum teacher"),
    "measuring nothing": ("plan --costs costs.json --threads 1", "--threads is for measuring a recipe"),
    "costs of the other kind": ("plan compress --costs costs.json", "'pipestill profile compress -o FILE.csv'"),
    "blocks of the other kind": ("plan soft-target --costs blocks.csv", "'pipestill profile soft-target -o FILE.json'"),
    "blocks of other models": ("plan compress --costs other.csv", "is of 1 blocks, the models of recipe 'compress' have 6"),
    "costs of other models": ("plan soft-target --costs costs.json", "the models of recipe 'soft-target' have 5 student"),
    "profile of nothing": ("profile", "'profile' needs a recipe"),
    "profile to a CSV": ("profile soft-target -o c.csv", "is of pipelines, so the name must end in .json"),
    "profile to JSON": ("profile compress -o c.json", "is of blockwise training, so the name must end in .csv"),
    "profile on no device": ("profile soft-target --devices 0", "devices 0 and microbatches 8; expected at least 1"),
    "simulated strategy of blocks": ("simulate --costs costs.json --strategy hybrid", "'hybrid' is of blockwise training"),
    "simulated strategy of pipelines": ("simulate --costs blocks.csv --strategy fill", "'fill' is of pipelines"),
    "simulated nearest": ("simulate --costs blocks.csv --strategy balancd", "(did you mean 'balanced'?)"),
    "simulated knobs": ("simulate --costs blocks.csv --stash n", "--stash is for pipelines"),
    "simulated batch": ("simulate --costs costs.json --batch 8", "--batch is for a CSV of blocks"),
    "compared batch": ("compare --virtual --costs costs.json --batch 8", "--batch is for a CSV of blocks"),
    "compared recipe of blocks": ("compare compress --virtual --devices 2", "give --costs FILE.csv"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_and_status_2(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words, expected = WRONG[case]
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, words)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith("pipestill: ") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before, "nothing half-written"


def test_plan_of_a_pipeline_is_what_simulate_reads(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "plan --costs costs.json --microbatches 4 -o plan.json")
    chosen = next(one for one in found["considered"] if one["chosen"])
    assert (found["kind"], found["chosen"], found["file"]) == ("pipeline", chosen["name"], "plan.json")
    assert chosen["seconds_per_step"] == pytest.approx(min(one["seconds_per_step"] for one in found["considered"]), rel=1e-3)
    simulated = figures(capsys, "simulate plan.json")
    assert simulated == {key: chosen[key] for key in simulated}
    assert figures(capsys, "plan --costs plan.json --microbatches 4 --strategy fill")["chosen"].startswith("fill"), (
        "a plan holds its costs"
    )
    status, _, err = run(capsys, "simulate plan.json --devices 2 --memory 3GB")
    assert status == 2
    assert "--devices is fixed by the plan" in err and "--memory is fixed by the plan" in err


@pytest.mark.parametrize("command", ["simulate --strategy gpipe", "plan"])
def test_costs_without_their_teacher_are_the_students_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`simulate --teacher none` timed the teacher's work all the same, and `plan` ended because `tspipe` needs a teacher."""
    said = figures(capsys, f"{command} --costs costs.json --devices 2 --microbatches 2 --teacher none")
    considered = {one["name"]: one for one in said.get("considered", [{"name": "gpipe", **said}])}
    assert considered["gpipe"]["teacher_partition"] == []
    assert considered["gpipe"]["seconds_per_step"] == pytest.approx((2 + 1) * 2 * (0.01 + 0.02))
    assert command != "plan" or "this task has none" in considered["tspipe"]["refused"]


def test_plan_of_blocks_is_what_simulate_reads(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "plan --costs blocks.csv --devices 3 -o plan.json")
    assert (found["kind"], found["batch"]) == ("blockwise", 64)
    assert [one["name"] for one in found["considered"]] == list(BLOCKWISE_STRATEGIES)
    chosen = next(one for one in found["considered"] if one["chosen"])
    assert chosen["speedup"] > 1
    assert len(chosen["memory_bytes"]) == len(chosen["plan"]) == 3
    simulated = figures(capsys, "simulate plan.json --draw plan.png")
    assert simulated.pop("picture") == "plan.png" and Path("plan.png").stat().st_size > 1000
    assert simulated == {key: chosen[key] for key in simulated}
    status, _, err = run(capsys, "plan --costs plan.json")
    assert status == 2
    assert "this is a blockwise plan" in err


@pytest.mark.parametrize("strategy", every_other(BLOCKWISE_STRATEGIES))
def test_simulate_of_blocks(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"simulate --costs blocks.csv --strategy {strategy} --devices 2 --batch 32"
    found = figures(capsys, words)
    assert set(found) == {
        "strategy", "devices", "batch", "seconds_per_step", "limit_seconds_per_step", "cost_model_seconds_per_step",
        "utilisation", "bubble", "window", "memory_bytes", "plan",
    }  # fmt: skip
    assert found["seconds_per_step"] >= found["limit_seconds_per_step"] * (1 - 1e-9)
    assert (found["cost_model_seconds_per_step"] is None) == (strategy == "balanced")
    status, out, _ = run(capsys, f"{words} --text --draw {strategy}.svg")
    assert status == 0
    assert "rank 0 |" in out and "ms a batch of 32 rows" in out
    assert Path(f"{strategy}.svg").stat().st_size > 1000


def test_what_does_not_fit_is_shown_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    free = figures(capsys, "plan --costs blocks.csv --devices 2")
    limit = sorted({max(one["memory_bytes"]) for one in free["considered"]})[1]
    tight = figures(capsys, f"plan --costs blocks.csv --devices 2 --memory {limit}")
    refused = [one for one in tight["considered"] if "refused" in one]
    assert refused and all("MiB" in one["refused"] for one in refused)
    _, out, _ = run(capsys, f"plan --costs blocks.csv --devices 2 --memory {limit}")
    for one in refused:
        assert f"{one['name']}: {one['refused']}" in out


@pytest.mark.parametrize("words", ["plan --costs costs.json --microbatches 4", "plan --costs blocks.csv"])
def test_tables_fit_into_80_columns(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, words)
    assert status == 0
    table = list(takewhile(lambda line: line.startswith(" "), out.splitlines()))
    assert sum("<- chosen" in line for line in table) == 1
    assert max(map(len, table)) <= 80


def test_a_profile_of_a_pipeline_serves_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    small = " ".join(SMALL)
    found = figures(capsys, f"profile soft-target {small} --devices 2 --threads 1 -o measured.json")
    assert found["costs"]["link"]["bytes_per_second"] > 0, "measured between two processes"
    assert Costs.load("measured.json") == Costs.from_json(found["costs"])
    assert any(block["weight_seconds"] for block in found["costs"]["student"][1:]), "the halves of backwards are measured"
    simulated = figures(capsys, f"simulate soft-target {small} --costs measured.json")
    assert simulated["strategy"] == "fill"
    _, out, _ = run(capsys, f"plan soft-target {small} --costs measured.json --strategy gpipe")
    assert f"pipestill train soft-target {small} --devices 2 --strategy gpipe --microbatches 8 --student_partition " in out
    assert "--costs measured.json" in out.splitlines()[-1]


def test_a_profile_of_one_process_is_standard_json(capsys: pytest.CaptureFixture[str]) -> None:
    """A link without a limit was written as Infinity, which is no JSON."""
    status, out, _ = run(capsys, f"profile soft-target {' '.join(SMALL)} -o measured.json")
    assert status == 0
    assert "links were not measured" in out and "teacher 0" in out
    text = Path("measured.json").read_text()
    assert "Infinity" not in text and '"bytes_per_second": null' in text
    assert Costs.load("measured.json").link.bytes_per_second == float("inf")


@pytest.mark.slow
def test_a_profile_of_blocks_serves_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = " ".join(TINY)
    found = figures(capsys, f"profile compress {tiny} --devices 2 --threads 1 -o measured.csv")
    profile = BlockProfile.load("measured.csv")
    assert [list(block.rows) for block in profile.blocks] == [[8, 16]] * len(found["blocks"]), "shares of 1 and 2 ranks"
    assert profile.link.to_json() == found["link"], "links are in the file too"
    planned = figures(capsys, f"plan compress {tiny} --costs measured.csv --devices 2")
    assert len(planned["considered"]) == len(BLOCKWISE_STRATEGIES), "not the recipe's own strategy alone"
    assert planned["batch"] == 16
    assert figures(capsys, f"simulate compress {tiny} --costs measured.csv")["strategy"] == "balanced"
    _, out, _ = run(capsys, f"plan compress {tiny} --costs measured.csv --memory 1GB")
    assert f"pipestill train compress {tiny} --devices 2 --strategy" in out and "--memory 1000000000 --costs measured.csv" in out


def test_the_config_of_a_run_serves_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "soft-target", *SMALL, "--strategy", "gpipe", "--print_config"]) == 0
    Path("config.yaml").write_text(capsys.readouterr().out)
    main(["profile", "config.yaml", "-o", "measured.json"])
    capsys.readouterr()
    found = figures(capsys, "plan config.yaml --costs measured.json --devices 2")
    assert len(found["considered"]) > 1, "the run's strategy is not the only one"


def test_figures_are_readable() -> None:
    assert [milliseconds(s) for s in (0.0, 1e-6, 0.0123, 0.04, 0.0999, 1.5)] == ["0.00", "0.00100", "12.3", "40.0", "100", "1500"]
    assert [shown_bytes(n) for n in (0, 320, 65536, 1.5e6, 3e11)] == ["0 B", "320 B", "64.0 KiB", "1.43 MiB", "279 GiB"]


@pytest.mark.parametrize("source", ["recipe", "config"])
def test_the_printed_command_trains_by_the_chosen_plan(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = " ".join(SMALL)
    if source == "config":
        words = f"train soft-target {small} --strategy gpipe --run_ahead 3 --print_config"
        Path("run.yaml").write_text(run(capsys, words)[1])
    begin = f"plan soft-target {small}" if source == "recipe" else "plan run.yaml"
    _, out, _ = run(capsys, f"{begin} --estimate h100 --devices 2 --microbatches 4 -o plan.json")
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["pipestill", "train", "soft-target"]
    recipe, options, _ = parse("train", command[3:], SoftTarget, RunOptions, Output)
    assert (recipe.teacher_width, recipe.batch_size, options.run_ahead) == (4, 64, None)
    workload = recipe.workload(options.seed)
    found = workload.trainer(workload.task(), options).plan(workload.loader, world=OneProcess(2))
    assert json.loads(json.dumps(found.to_json())) == json.loads(Path("plan.json").read_text())
