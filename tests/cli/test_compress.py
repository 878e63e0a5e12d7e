"""Recipes that train block by block, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipestill.cli import main
from pipestill.recipes.compress import DATA, SHAPES, Compress

SMALL = [
    "--widths", "4,6", "--depths", "1,1", "--student_depths", "1,1", "--epochs", "1", "--teacher_epochs", "1",
    "--fine_tuning_epochs", "1", "--batch_size", "128",
]  # fmt: skip
PROFILE = "block,rows,teacher_forward_seconds,student_step_seconds,input_bytes_per_row,parameter_bytes\n" + "".join(
    f"{block},{rows},0.00{block + 1},0.01,100,1000\n" for block in range(3) for rows in (64, 128)
)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


WRONG = {
    "strategy of pipelines": ("--strategy fill", "strategy 'fill' is of recipes that train end to end; recipe 'compress'"),
    "unknown strategy": ("--strategy relay-dup", "no strategy 'relay-dup' (did you mean 'relay-dpu'?)"),
    "staleness": ("--staleness 1", "staleness is of a momentum teacher"),
    "missing profile": ("--costs p.csv", "cannot read block profile 'p.csv'"),
    "profile of other blocks": ("--costs three.csv", "the costs are of 3 blocks, the models have 6"),
    "profile without memory": ("--widths 4,6 --depths 1,1 --student_depths 1,1 --costs three.csv --memory 1GB", "memory"),
    "memory in words": ("--memory much", "memory takes an amount such as 80GB or 512MiB, got 'much'"),
    "memory that nothing fits into": ("--memory 1KB --devices 2 --widths 2 --depths 1 --student_depths 1", "fits into"),
    "reference on two devices": ("--strategy reference --devices 2", "'reference' runs on one device, not 2"),
    "missing data": ("--preset cifar10", "preset 'cifar10' reads its images from --data PATH"),
    "no such directory": ("--data nowhere", "no directory 'nowhere'"),
    "widths in words": ("--widths wide", "widths takes whole numbers such as 3,3, got 'wide'"),
    "several impossible options": ("--widths 4,4 --epochs 0", "epochs is 0; expected at least 1; depths is 1,2,2,2,2"),
    "unknown preset": ("--preset cifar", "preset takes digits or cifar10 or imagenet, got 'cifar'"),
    "missing teacher": ("--teacher t.safetensors", "cannot read weights from 't.safetensors'"),
    "teacher that is no file of weights": ("--teacher three.csv", "cannot read weights from 'three.csv'"),
    "clip of nothing": ("--clip_grad_norm 0", "clip_grad_norm is 0"),
    "partition that does not add up": ("--devices 2 --student_partition 2,2", "adds up to 4, but the student has 6 blocks"),
}


@pytest.mark.parametrize(("words", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_status_2(
    words: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("three.csv").write_text(PROFILE)
    status, out, err = run(capsys, "train", "compress", *words.split())
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith("pipestill: ")
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["three.csv"], "nothing half-written"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--strategy relay", "strategy 'relay' is of recipes that train block by block; recipe 'soft-target' trains end to end"),
        (
            "--costs p.csv",
            "costs 'p.csv' are of models that are trained block by block, and recipe 'soft-target' trains end to end; "
            "'pipestill profile soft-target -o FILE.json' measures what it needs",
        ),
    ],
)
def test_pipelines_refuse_what_is_of_blocks(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "check"):
        status, _, err = run(capsys, command, "soft-target", *words.split())
        assert status == 2
        assert expected in err


def test_defaults_are_those_of_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "train", "compress", "--memory", "2GB", "--preset", "cifar10", "--print_config")
    assert {"strategy: balanced", "memory: 2000000000", "batch_size: 256", "- 512"} <= set(out.splitlines())
    Path("config.yaml").write_text(out)
    assert run(capsys, "train", "config.yaml", "--print_config")[1] == out
    _, out, _ = run(capsys, "train", "compress", "--help")
    assert "(default: balanced)" in out
    _, out, _ = run(capsys, "train", "soft-target", "--print_config")
    assert "strategy: fill" in out.splitlines()


@pytest.mark.slow
def test_train_leaves_a_whole_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "train", "compress", *SMALL, "--devices", "2", "--threads", "1", "--json")
    assert status == 0
    summary = json.loads(out)
    directory = Path(summary["directory"])
    names = {"config.yaml", "plan.json", "metrics.jsonl", "summary.json", "timeline.svg", "trace.json.gz", "train.log"}
    assert names | {"export", "teacher", "fine_tuning", "student_alone"} == {p.name for p in directory.iterdir()}
    wanted = (
        "recipe strategy devices backend steps samples seconds seconds_per_step samples_per_second utilisation bubble "
        "predicted_seconds_per_step limit_seconds_per_step staleness peak_memory_bytes metrics exact versions block_losses"
    )
    assert set(wanted.split()) <= set(summary)
    assert (summary["strategy"], summary["steps"], summary["samples"], summary["devices"]) == ("balanced", 12, 1437, 2)
    assert list(summary["block_losses"]) == ["stage1", "stage2", "classifier"]
    assert {"teacher", "blocks", "student", "student_alone", "parameters"} == set(summary["metrics"])
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "block_0", "block_2", "lr", "seconds", "bubble"} <= set(logged[0])
    plan = json.loads((directory / "plan.json").read_text())
    assert (plan["kind"], plan["strategy"], plan["devices"], len(plan["ranks"])) == ("blockwise", "balanced", 2, 2)
    assert plan["seconds_per_step"] == pytest.approx(summary["predicted_seconds_per_step"])
    student = load_file(directory / "export/model.safetensors")
    before = load_file(directory / "export/before_fine_tuning.safetensors")
    assert set(student) == set(before) == set(Compress(**as_options()).workload(0).task().student.state_dict())
    assert any(not student[name].equal(before[name]) for name in student)
    shown = json.loads(run(capsys, "trace", str(directory), "--json", "--draw", "again.svg")[1])
    assert shown["ranks"] == plan["ranks"]
    assert Path("again.svg").stat().st_size > 1000
    teacher = str(directory / "teacher/export/model.safetensors")
    _, out, _ = run(capsys, "train", "compress", "--json", "--teacher", teacher, *SMALL, "--strategy", "ls")
    again = json.loads(out)
    assert again["metrics"]["teacher"]["accuracy"] == summary["metrics"]["teacher"]["accuracy"]
    if summary["exact"] is True:
        assert again["metrics"]["blocks"] == summary["metrics"]["blocks"], "no strategy changes the result"
    assert len(list(Path(again["directory"]).glob("trace-*.json.gz"))) == 3
    assert run(capsys, "trace", again["directory"])[0] == 0


def as_options() -> dict[str, Any]:
    return {"widths": (4, 6), "depths": (1, 1), "student_depths": (1, 1)}


def test_reference_and_no_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "train", "compress", *SMALL, "--strategy", "reference", "--fine_tuning_epochs", "0")
    assert status == 0
    assert "student, its blocks trained alone" in out
    assert "then fine-tuned" not in out
    directory = Path("runs/compress-1")
    assert not (directory / "plan.json").exists()
    assert not (directory / "fine_tuning").exists()
    assert not (directory / "export/before_fine_tuning.safetensors").exists()
    status, _, err = run(capsys, "trace", str(directory))
    assert status == 2
    assert "a plain loop, which leaves no timeline" in err


def test_recipes_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    names = [recipe["name"] for recipe in json.loads(run(capsys, "recipes", "--json")[1])["recipes"]]
    assert "compress" in names


@pytest.mark.parametrize("strategy", ["ls", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relay", "relay-dpu"))])
def test_check_is_exact_where_blocks_see_whole_batches(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "compress", *SMALL, "--strategy", strategy, "--devices", "2", "--steps", "5", "--batch_size", "16"]
    status, out, _ = run(capsys, *words, "--transport", "in-process" if strategy == "ls" else "both", "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["exact"], result["max_abs_difference"], result["rows_split"]) == (True, 0.0, False)
    assert result["problems"] == []


def test_check_allows_rounding_where_rows_are_split(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "compress", *SMALL, "--strategy", "dp", "--devices", "2", "--steps", "5", "--batch_size", "16"]
    words += ["--transport", "in-process"]
    status, out, _ = run(capsys, *words, "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["exact"], result["rows_split"], result["dtype"]) == (False, True, "float64")
    assert 0 < result["max_relative_difference"] < result["tolerance"] == 1e-9
    status, out, _ = run(capsys, *words, "--steps", "2")
    assert status == 0
    assert "compared in float64 with batch norm frozen" in out


@pytest.mark.parametrize("strategy", ["relay", "dp"])
def test_check_of_a_broken_run_is_status_1(
    strategy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that move a little further than they should, wherever a schedule runs."""
    from pipestill.runtime.blockwise.worker import BlockwiseWorker

    whole = BlockwiseWorker.update

    def further(self, block, batch):  # type: ignore[no-untyped-def]
        whole(self, block, batch)
        if block == 1 and batch == 3 and self.apart:
            with self._own_tensors(block):
                next(iter(self.blocks[block].parameters.values())).data.add_(1e-6)

    monkeypatch.setattr(BlockwiseWorker, "update", further)
    words = ["check", "compress", *SMALL, "--strategy", strategy, "--devices", "2", "--steps", "5", "--batch_size", "16"]
    status, out, _ = run(capsys, *words, "--transport", "in-process", "--json")
    result = json.loads(out)
    assert status == 1
    assert not result["exact"]
    assert any("student.features." in problem for problem in result["problems"])


def test_page_shows_the_presets_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs/blockwise.md").read_text()
    for (preset, network), (teacher, _) in SHAPES.items():
        data = DATA[preset]
        listed = [",".join(map(str, numbers)) or "linear" for numbers in (teacher.widths, teacher.depths, teacher.hidden)]
        epochs = f"{data.teacher_epochs}, {data.epochs}, {data.fine_tuning_epochs}"
        row = f"| `{preset}` | `{network}` | {' | '.join(listed)} | {data.image_size} | {data.batch_size} | {epochs} |"
        assert row in page
