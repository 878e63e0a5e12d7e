import dataclasses
import re
from importlib import import_module

import pytest

from pipestill.cli import main
from pipestill.cli.options import meanings_of, parse
from pipestill.recipes import RECIPES
from pipestill.recipes.run_options import RunOptions

GROUPS = [
    RunOptions,
    *(entry.load() for entry in RECIPES.values()),
    *(
        getattr(import_module(f"pipestill.cli.{module}"), name)
        for module, name in (
            ("check", "CheckOptions"), ("compare", "CompareOptions"), ("compare", "VirtualCompareOptions"),
            ("doctor", "DoctorOptions"), ("plan", "PlanOptions"), ("profile", "ProfileOptions"), ("recipes", "RecipesOptions"),
            ("simulate", "SimulateOptions"), ("trace", "TraceOptions"), ("train", "Output"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_the_help_of_every_option_stands_alone(group):
    told = meanings_of(group)
    assert set(told) == {field.name for field in dataclasses.fields(group)}
    leaning = re.compile(r"^(of|as|same|what|how|their|its|these|those)\b|\bthe same\b", re.IGNORECASE)
    assert {name: text for name, text in told.items() if leaning.search(text)} == {}


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "compare",
        "trace",
        "train byol",
        "plan nas",
        "compare distilbert",
        "check soft-target",
        "profile dino",
        "simulate",
        "compare --virtual",
    ],
)
def test_help_fits_eighty_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: pipestill ") and len(lines) > 10
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", ["check", "compare", "check soft-target", "compare soft-target", "compare --virtual"])
def test_help_says_what_the_command_does(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    told = capsys.readouterr().out.splitlines()
    about = "Prove a schedule, then compare its weights" if command.startswith("check") else "Measure strategies side by side"
    assert any(line.startswith(about) for line in told)


def test_help_shows_the_usual_preset_and_how_a_flag_is_taken_back(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["train", "distilbert", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--layers N layers of the teacher (default: 4 in preset reference)" in told
    assert "--group_by_length true|false" in told
    assert "--tie_embeddings let the output layer" in told
    assert "--microbatches N slices of a batch whose gradients add up, where a model is trained end to end (default: 4)" in told


def test_help_of_a_recipe_leaves_out_what_needs_none(capsys):
    assert main(["plan", "byol", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--views" not in told and "--devices" in told
    assert main(["plan", "--help"]) == 0
    assert "--views" in capsys.readouterr().out


def test_help_shows_a_recipes_own_keys_before_those_that_it_shares(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("train", ["--help"], RECIPES["compress"].load())
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert shown[0] == "preset"
    assert shown.index("network") < shown.index("teacher_epochs") < shown.index("batch_size")
