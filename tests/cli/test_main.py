"""The command line as a user meets it: messages, statuses, files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from pipestill.cli import main

SMALL = ["--teacher_width", "4", "--teacher_depth", "2", "--epochs", "1", "--teacher_epochs", "1", "--batch_size", "256"]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


WRONG = {
    "unknown command": (["trian"], "no command 'trian' (did you mean 'train'?)"),
    "unknown recipe": (["train", "soft-targt"], "no recipe 'soft-targt' (did you mean 'soft-target'?)"),
    "no recipe": (["train"], "needs a recipe"),
    "unknown key": (["train", "soft-target", "--student_widht", "3"], "(did you mean 'student_width'?)"),
    "unknown key with two letters swapped": (["train", "soft-target", "--devicse", "2"], "(did you mean 'devices'?)"),
    "wrong type": (["train", "soft-target", "--lr", "fast"], "lr"),
    "zero microbatches": (["train", "soft-target", "--microbatches", "0"], "microbatches is 0; expected at least 1"),
    "zero devices": (["train", "soft-target", "--devices", "0"], "devices is 0; expected at least 1"),
    "more devices than blocks": (["train", "soft-target", "--devices", "7"], "the student has 5 blocks for 7 devices"),
    "partition that does not add up": (
        ["train", "soft-target", "--devices", "2", "--student_partition", "2,2"],
        "student partition [2, 2] adds up to 4, but the student has 5 blocks",
    ),
    "partition of another length": (
        ["train", "soft-target", "--devices", "2", "--student_partition", "5"], "has 1 stages for 2 devices",
    ),
    "empty stage": (["train", "soft-target", "--devices", "2", "--student_partition", "5,0"], "has an empty stage"),
    "partition in words": (["train", "soft-target", "--student_partition", "a,b"], "whole numbers such as 3,3"),
    "unknown strategy": (["train", "soft-target", "--strategy", "fil"], "no strategy 'fil' (did you mean 'fill'?)"),
    "reference on two devices": (
        ["train", "soft-target", "--strategy", "reference", "--devices", "2"], "'reference' runs on one device, not 2",
    ),
    "missing config": (["train", "nothing.yaml"], "cannot read config 'nothing.yaml'"),
    "missing costs": (["train", "soft-target", "--costs", "c.json"], "cannot read costs file 'c.json'"),
    "missing teacher": (["train", "soft-target", "--teacher", "t.safetensors"], "cannot read weights from 't.safetensors'"),
    "device that is not there": (["train", "soft-target", "--device", "tpu"], "no device type 'tpu'"),
    "impossible option": (["train", "soft-target", "--dropout", "1.5"], "dropout is 1.5"),
    "several impossible options": (["train", "soft-target", "--epochs", "0", "--batch_size", "0"], "epochs is 0"),
    "run-ahead of another strategy": (
        ["check", "soft-target", "--strategy", "gpipe", "--run_ahead", "2"], "run_ahead is a knob of 'fill'",
    ),
    "run-ahead of nothing": (["check", "soft-target", "--run_ahead", "0"], "run_ahead is 0"),
    "uniform in three": (["simulate", "--uniform", "1,1,1"], "--uniform takes four numbers"),
    "uniform in words": (["simulate", "--uniform", "a,b,c,d"], "--uniform takes four numbers"),
    "nothing to simulate": (["simulate"], "needs one of"),
    "missing plan": (["simulate", "plan.json"], "cannot read plan 'plan.json'"),
    "picture of another kind": (
        ["simulate", "--uniform", "1,1,1,1", "--draw", "x.pdf"], ".svg",
    ),
    "no run": (["trace", "nowhere"], "'nowhere' is no finished run"),
    "no run named": (["trace"], "needs the directory of a run"),
    "unknown strategies": (["compare", "soft-target", "--strategies", "fill,torch-1f1c"], "did you mean 'torch-1f1b'?"),
    "no strategies": (["compare", "soft-target", "--strategies", ","], "--strategies names none"),
    "zero steps": (["check", "soft-target", "--steps", "0"], "steps is 0"),
    "costs for a recipe": (["check", "b.csv"], "'b.csv' is neither a recipe nor a config.yaml, which 'check' needs first"),
    "plan for a recipe": (["compare", "plan.json"], "'pipestill simulate' reads a plan.json"),
    "no threads, no time": (
        ["train", "soft-target", "--threads", "0", "--timeout_seconds", "0"],
        "threads is 0; expected at least 1; timeout_seconds is 0.0; expected more than 0",
    ),
    "picture of no steps": (
        ["simulate", "--uniform", "1,1,1,1", "--draw", "s.svg", "--steps", "0"], "a picture of 0 steps; expected at least 1",
    ),
    "comparison drawn as another kind": (
        ["compare", "--virtual", "--uniform", "9,9,9,9", "--draw", "s.jpg"], "cannot draw 's.jpg': the name must end in .svg",
    ),
    "virtual devices that are not": (["compare", "soft-target", "--virtual", "false"], "virtual is false; leave --virtual out"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_and_status_2(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words, expected = WRONG[case]
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith("pipestill: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_messages_are_wrapped_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["trian"]) == 2
    lines = screen.getvalue().splitlines()
    assert lines[0] == "pipestill: no command 'trian' (did you mean 'train'?); there"
    assert len(lines) > 1 and max(map(len, lines)) <= 60


def test_unknown_keys_of_file_and_command_line_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("recipe: soft-target\nepoch: 3\n")
    status, _, err = run(capsys, "train", "config.yaml", "--devicse", "2")
    assert status == 2
    assert "no key 'devicse'" in err and "no key 'epoch'" in err


def test_interrupt_is_status_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of any program that Ctrl-C ends: a loop of a shell goes on after status 1."""

    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipestill.cli.recipes.run", interrupted)
    assert run(capsys, "recipes") == (130, "", "pipestill: interrupted\n")


def test_cuda_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run(capsys, "train", "soft-target", "--device", "cuda", "--devices", "2")
    assert status == 2
    assert "2 CUDA devices asked for, this machine has 0" in err


def test_only_train_runs_under_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank ran the whole of `check --json`, so there were several objects on stdout."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", lambda status: None)  # which ends a rank under torchrun
    status, out, err = run(capsys, "check", "soft-target", "--json")
    assert (status, out) == (2, "")
    assert "torchrun runs 'train' only, and 'check' once on each rank" in err


def test_all_wrong_options_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "train", "soft-target", "--epochs", "0", "--batch_size", "0", "--dropout", "2")
    assert all(part in err for part in ("epochs is 0", "batch_size is 0", "dropout is 2"))
    status, _, err = run(capsys, "train", "soft-target", "--epochs", "x", "--batch_size=y", "--lr", "0.1")
    assert status == 2
    assert "epochs takes a whole number, got 'x'; batch_size takes a whole number, got 'y'\n" in err


def test_wrong_keys_and_values_of_a_config_file_are_all_named_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("recipe: soft-target\nepochs: x\nbatch_size: y\n")
    _, _, err = run(capsys, "train", "mine.yaml", "--lr", "z")
    assert "epochs takes a whole number, got 'x' in 'mine.yaml'; batch_size takes a whole number, got 'y' in 'mine.yaml'" in err
    assert "lr takes a number, got 'z'\n" in err
    Path("mine.yaml").write_text("recipe: soft-target\nepochz: 3\n")
    _, _, err = run(capsys, "train", "mine.yaml", "--epoch", "3")
    assert "no key 'epoch' (did you mean 'epochs'?); no key 'epochz' in 'mine.yaml' (did you mean 'epochs'?)" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 3\n", "has no line 'recipe: NAME'"),
        ("recipe: soft-target\nepoch: 3\n", "no key 'epoch' in "),
        ("recipe: [\n", "config 'config.yaml' is not YAML, line 2: expected the node content, but found '<stream end>'\n"),
        ("- a\n", "is not a list of 'key: value' lines"),
        ("recipe: soft-target\nepochs: many\n", "epochs"),
    ],
)
def test_wrong_config_files(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(text)
    status, _, err = run(capsys, "train", "config.yaml")
    assert status == 2
    assert expected in err


def test_a_directory_that_holds_something_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/work.txt").write_text("precious")
    status, _, err = run(capsys, "train", "soft-target", *SMALL, "--out", "mine")
    assert status == 2
    assert "run directory 'mine' is not empty" in err
    assert [p.name for p in Path("mine").iterdir()] == ["work.txt"]


def test_command_line_wins_over_the_file_and_the_result_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("recipe: soft-target\nepochs: 3\nlr: 0.5\nstudent_partition: [3, 2]\n")
    status, out, _ = run(capsys, "train", "config.yaml", "--epochs=7", "--student-width", "5", "--print_config")
    assert status == 0
    lines = out.splitlines()
    assert {"epochs: 7", "lr: 0.5", "student_width: 5"} <= set(lines)
    assert "student_partition:" in lines
    Path("again.yaml").write_text("recipe: soft-target\n" + out)
    assert run(capsys, "train", "again.yaml", "--print_config")[1] == out


def test_train_leaves_a_whole_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "train", "soft-target", *SMALL, "--json", "--threads", "1", "--microbatches", "2")
    assert status == 0
    summary = json.loads(out)
    directory = Path(summary["directory"])
    assert directory == Path("runs/soft-target-1")
    names = {"config.yaml", "plan.json", "metrics.jsonl", "summary.json", "timeline.svg", "trace.json.gz", "train.log"}
    assert names | {"export", "teacher", "student_alone"} == {p.name for p in directory.iterdir()}
    wanted = (
        "recipe strategy devices backend steps samples seconds seconds_per_step samples_per_second utilisation bubble "
        "predicted_seconds_per_step staleness peak_memory_bytes metrics exact versions"
    )
    assert set(wanted.split()) <= set(json.loads((directory / "summary.json").read_text()))
    assert (summary["steps"], summary["samples"], summary["exact"]) == (6, 1437, True)
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "soft_target", "cross_entropy", "lr", "grad_norm", "seconds", "samples_per_second", "bubble"} <= set(
        logged[0]
    )
    assert logged[-1]["validation_accuracy"] == summary["metrics"]["student"]["accuracy"]
    assert json.loads(run(capsys, "trace", str(directory), "--json")[1])["devices"] == 1
    assert run(capsys, "simulate", str(directory / "plan.json"), "--json")[0] == 0
    teacher = str(directory / "teacher/export/model.safetensors")
    status, out, _ = run(capsys, "train", "soft-target", *SMALL, "--json", "--teacher", teacher, "--microbatches", "2")
    again = json.loads(out)
    assert again["metrics"]["teacher"]["accuracy"] == summary["metrics"]["teacher"]["accuracy"]
    assert again["metrics"]["student"] == summary["metrics"]["student"], "the same teacher gives the same student"


def test_simulate_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = "simulate --uniform 1,1,1,1 --devices 4 --microbatches 8 --strategy fill --teacher frozen --json"
    status, out, _ = run(capsys, *words.split())
    figures = json.loads(out)
    assert status == 0
    assert figures["strategy"] == "fill"
    assert figures["utilisation"] == 0.97
    assert figures["seconds_per_step"] == pytest.approx(33)
    assert figures["limit_seconds_per_step"] == 32
    assert figures["stash_peak"] == [4, 3, 2, 1]
    assert figures["staleness"] == 0


def test_check_says_exact_and_proves_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "soft-target", "--devices", "3", "--transport", "in-process", "--steps", "8", "--json"]
    status, out, _ = run(capsys, *words, "--optimizer", "adamw", "--dropout", "0.2", "--microbatches", "3", "--batch_size", "32")
    result = json.loads(out)
    assert status == 0
    assert (result["exact"], result["max_abs_difference"], result["problems"]) == (True, 0.0, [])
    assert result["versions"][2] == {"step": 2, "student": [2], "teacher": [0]}
    assert result["microbatch_difference"] is None
    assert "batch norm" in result["microbatch_difference_missing"]


def test_check_of_a_broken_run_is_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that loses a microbatch's gradient, as a released system's did."""
    from pipestill.runtime.pipeline.stage import StudentStage

    whole = StudentStage.backward

    def lossy(self, gradients, step, microbatch):  # type: ignore[no-untyped-def]
        before = {name: None if p.grad is None else p.grad.clone() for name, p in self.parameters.items()}
        sent = whole(self, gradients, step, microbatch)
        if (step, microbatch) == (1, 1):
            for name, p in self.parameters.items():
                p.grad = before[name]
        return sent

    monkeypatch.setattr(StudentStage, "backward", lossy)
    words = ["check", "soft-target", "--devices", "2", "--transport", "in-process", "--steps", "3", "--json"]
    status, out, _ = run(capsys, *words, "--batch_size", "32")
    result = json.loads(out)
    assert status == 1
    assert not result["exact"]
    assert result["max_abs_difference"] > 0
    assert result["problems"]


def test_recipes_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "recipes", "--json")
    assert status == 0
    assert json.loads(out)["recipes"][0]["name"] == "soft-target"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["-V"], ["train", "--help"], ["train", "soft-target", "--help"]])
def test_help_is_status_0(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert out


@pytest.mark.slow
def test_compare_measures_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "soft-target", "--devices", "2", "--rounds", "1", "--steps", "6", "--batch_size", "64", "--json"]
    status, out, _ = run(capsys, *words, "--strategies", "sequential,fill,torch-1f1b", "--draw", "all.svg")
    figures = json.loads(out)
    assert status == 0
    assert [r["strategy"] for r in figures["results"]] == ["sequential", "fill", "torch-1f1b"]
    assert figures["results"][0]["speedup"] == 1.0
    assert figures["calibration"]["ceiling"] > 0
    assert {"predicted_seconds_per_step", "utilisation", "stash_peak"} <= set(figures["results"][1])
    assert Path("all.svg").stat().st_size > 1000
