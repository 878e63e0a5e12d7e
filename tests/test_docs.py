"""The pages say what is so: links lead somewhere, commands parse, code runs, tables and pictures are what the tool gives."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

import pipestill as ps
from pipestill.cli import main
from pipestill.cli.commands import COMMANDS
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.schedule import PIPELINE_STRATEGIES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
UNIFORM = ["simulate", "--uniform", "1,1,1,1", "--json"]


def text_of(page: Path | str) -> str:
    return (ROOT / page).read_text()


def fences_of(page: Path | str, language: str) -> list[str]:
    """The code blocks of a page that are marked as `language`."""
    return [
        code for found, code in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL) if found == language
    ]


def prose_of(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    assert dead == []


def test_the_sdist_holds_whatever_pages_link_to() -> None:
    """A page in the sdist links to nothing that only the repository has."""
    project = tomllib.loads(text_of("pyproject.toml"))
    held = {ROOT / name.lstrip("/") for name in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert all(map(Path.exists, held))
    held |= {ROOT / "README.md", ROOT / "pyproject.toml"}  # always in it
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s#]+)", text_of(page)):
            if not re.match(r"[a-z]+:", link):
                target = (page.parent / link).resolve()
                assert held & {target, *target.parents}, f"{page.name}: {link} is not in the sdist"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the pages, from code and from the pieces of code in their prose: page and words."""
    for page in PAGES:
        lines = "\n".join(fences_of(page, "")).splitlines()
        pieces = re.findall(r"`([^`]+)`", re.sub(r"\s*\n\s*", " ", prose_of(page)))
        for piece in (*lines, *pieces):
            if found := re.match(r"(?:\.venv/bin/)?pipestill (.*?)(?: {3}.*)?$", piece):
                yield page.name, shlex.split(found[1])


def test_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """In full with --print_config, which does nothing else. Words in capitals stand for something: there the keys only."""
    wrong, seen = [], set()
    for page, words in commands():
        seen.add(words[0])
        if len(words) == 1:
            wrong += [f"{page}: {words}"] if words[0] not in (*COMMANDS, "COMMAND", "-V") else []
        elif any(re.search(r"(?<![\w-])[A-Z]", word) or word.endswith(".yaml") for word in words):
            keys = {word for word in words if word.startswith("--")} - {"--help"}
            if words[0] in COMMANDS and keys:
                recipe = [] if words[0] in ("simulate", "trace") else ["soft-target"]
                main([words[0], *recipe, "--help"])
                shown = capsys.readouterr().out
                wrong += [f"{page}: {key} of {words}" for key in keys if f"{key} " not in shown]
        elif main([*words, "--print_config"]) != 0:
            wrong.append(f"{page}: {words}: {capsys.readouterr().err}")
    assert wrong == []
    assert set(COMMANDS) <= seen, "a command that no page shows"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_key(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["soft-target"] if command in ("train", "compare", "check") else []
    assert main([command, *recipe, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: pipestill {command}")
    assert not re.search(r"^  --\S+( \S+)?\n(?! {20})", shown, re.MULTILINE), "a key without its meaning"


def test_files_and_targets_that_pages_name_exist() -> None:
    makefile = text_of("Makefile")
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", text_of(page), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
        for path in re.findall(r"`((?:docs|tests|benchmarks|src)/[\w/.]+\.(?:py|md|svg))", text_of(page)):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def names_of(node: ast.AST) -> list[str]:
    """What a definition or an assignment names."""
    targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
    return [name for name in (getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)) if name]


def test_contributing_answers_where_things_are() -> None:
    """Each answer names a file, and mostly a function, a class, a method or a constant in it."""
    answers = table_after("CONTRIBUTING.md", "Ten questions")
    assert len(answers) == 10
    for question, answer in answers:
        path, _, name = answer.partition(" (")[0].replace("`", "").partition(": ")
        tree: ast.AST = ast.parse(text_of(path))
        for part in name.split(".") if name else ():
            inside = [node for node in ast.iter_child_nodes(tree) if part in names_of(node)]
            assert inside, f"{question} {path} has no {name}"
            tree = inside[0]


@pytest.mark.slow
def test_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its code in order, in one process; it asserts by itself that the student learnt, and equals the plain loop's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            exec(compile("\n".join(fences_of("docs/tutorial.md", "python")), "docs/tutorial.md", "exec"), {"__name__": "distil"})
    finally:
        torch.set_num_threads(threads)
    assert {p.name for p in tmp_path.iterdir()} == {"student-0.pt", "timeline.svg", "trace.json.gz"}


@pytest.mark.slow
def test_blockwise_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code asserts by itself that the student learnt."""
    monkeypatch.delenv("RANK", raising=False)
    with torch.random.fork_rng():
        exec(compile("\n".join(fences_of("docs/blockwise.md", "python")), "docs/blockwise.md", "exec"), {"__name__": "page"})


def test_losses_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code asserts by itself that microbatches change no update, and that what compares rows is refused."""
    monkeypatch.delenv("RANK", raising=False)
    with torch.random.fork_rng():
        exec(compile("\n".join(fences_of("docs/losses.md", "python")), "docs/losses.md", "exec"), {"__name__": "page"})


@pytest.mark.slow
def test_language_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code asserts by itself that blocks are the models, and that the student learnt."""
    pytest.importorskip("transformers")
    monkeypatch.delenv("RANK", raising=False)
    with torch.random.fork_rng():
        exec(compile("\n".join(fences_of("docs/language.md", "python")), "docs/language.md", "exec"), {"__name__": "page"})


def test_language_data_page_runs() -> None:
    """Its code asserts by itself what batches hold; the summary that it prints is the one that it shows."""
    pytest.importorskip("transformers")
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile("\n".join(fences_of("docs/language_data.md", "python")), "docs/language_data.md", "exec"), names)
    assert names["examples"].counts.summary() == fences_of("docs/language_data.md", "text")[0].strip()


@pytest.mark.slow
def test_teacher_cache_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code asserts by itself that a student learns the same from the cache as from the teacher."""
    pytest.importorskip("transformers")
    monkeypatch.delenv("RANK", raising=False)
    with torch.random.fork_rng():
        exec(
            compile("\n".join(fences_of("docs/teacher_cache.md", "python")), "docs/teacher_cache.md", "exec"),
            {"__name__": "page"},
        )


@pytest.mark.slow
def test_momentum_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code asserts by itself that the features got better, and that the pipeline equals the plain loop."""
    monkeypatch.delenv("RANK", raising=False)
    with torch.random.fork_rng():
        exec(compile("\n".join(fences_of("docs/momentum.md", "python")), "docs/momentum.md", "exec"), {"__name__": "page"})


def test_readme_example_runs() -> None:
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(2)]
    names: dict[str, Any] = {
        "teacher": nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)), nn.Linear(6, 3)),
        "student": nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)),
        "train_loader": batches,
        "val_loader": batches,
    }
    (example,) = fences_of("README.md", "python")
    exec(compile(example, "README.md", "exec"), names)


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*UNIFORM, *words]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


def table_after(page: str, start: str) -> list[list[str]]:
    """The cells of the first table after `start`, without its head."""
    lines = text_of(page).partition(start)[2].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


SIZES = ((4, 8), (8, 16), (8, 8))
"""Devices and microbatches of the tables' columns."""


@pytest.mark.parametrize("column", [0, *(pytest.param(column, marks=pytest.mark.slow) for column in (1, 2))])
def test_table_of_strategies_is_what_the_simulator_gives(column: int, capsys: pytest.CaptureFixture[str]) -> None:
    t, f, b = 1, 1, 2

    def formula(strategy: str, n: int, m: int) -> int:
        if strategy == "sequential":
            return n * m * (t + f + b)
        path = (m + n - 1) * (f + b)
        return max(m * (t + f + b), path) if strategy == "fill" else m * t + path

    rows = table_after("docs/schedules.md", "Simulated and by formula")
    for_momentum = ("tspipe", "async")
    assert [row[0] for row in rows] == [name for name in PIPELINE_STRATEGIES if name not in for_momentum]
    n, m = SIZES[column]
    for strategy, *cells in rows:
        assert len(cells) == len(SIZES)
        figures = simulated(capsys, "--devices", str(n), "--microbatches", str(m), "--strategy", strategy)
        expected = f"{figures['seconds_per_step']:g} / {formula(strategy, n, m)}, {figures['utilisation']:.3f}"
        assert cells[column] == expected, f"{strategy}, n = {n}, M = {m}"


@pytest.mark.parametrize("row", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_table_of_run_ahead_is_what_the_simulator_gives(row: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table_after("docs/schedules.md", "`run_ahead` bounds the second")
    assert [given for given, *_ in rows] == ["not given", "8", "1"]
    given, *cells = rows[row]
    bound = [] if given == "not given" else ["--run_ahead", given]
    figures = simulated(capsys, "--devices", "4", "--microbatches", "8", *bound)
    assert cells == [f"{figures['seconds_per_step']:g}", f"{figures['utilisation']:.3f}", str(figures["run_ahead"])]


def test_rows_that_schedules_shows_are_the_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--uniform", "1,1,1,1", "--devices", "3", "--microbatches", "4", "--text"]) == 0
    shown = re.findall(r"^rank \d \| .*$", text_of("docs/schedules.md"), re.MULTILINE)
    assert shown == re.findall(r"^rank \d \| .*$", capsys.readouterr().out, re.MULTILINE)


def pictures() -> dict[str, str]:
    drawn: dict[str, str] = runpy.run_path(str(ROOT / "docs/draw_images.py"))["PICTURES"]
    return drawn


@pytest.mark.slow
def test_table_of_filling_is_what_the_simulator_gives(capsys: pytest.CaptureFixture[str]) -> None:
    for teacher, words, *shown in table_after("docs/filling.md", "Where each strategy stands"):
        knobs = [*words.split()[1:], "--teacher", {"frozen": "frozen", "momentum": "ema"}[teacher]]
        for (devices, microbatches), utilisation in zip(SIZES, shown, strict=True):
            size = ["--devices", str(devices), "--microbatches", str(microbatches)]
            assert main([*UNIFORM, *size, *knobs]) == 0
            assert json.loads(capsys.readouterr().out)["utilisation"] == float(utilisation), (words, devices)


def test_every_picture_is_shown_with_the_command_that_drew_it() -> None:
    shown = "".join(map(text_of, ("README.md", "docs/schedules.md", "docs/filling.md", "docs/blockwise-plans.md")))
    assert {p.stem for p in (ROOT / "docs/images").iterdir()} == set(pictures())
    for name, command in pictures().items():
        assert f"`pipestill {command}`" in shown
        assert f"images/{name}.svg)" in shown


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "blocks-balanced" else ()) for name in pictures()]
)
def test_pictures_are_what_the_tool_draws_now(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pinned = re.search(r"^matplotlib==(\S+)", text_of("constraints.txt"), re.MULTILINE)
    if pinned is None or pinned[1] != version("matplotlib"):
        pytest.skip("another matplotlib draws other bytes")
    command = pictures()[name].replace(f"docs/images/{name}.svg", str(tmp_path / "again.svg"))
    assert main([*command.split(), "--json"]) == 0
    same = (tmp_path / "again.svg").read_bytes() == (ROOT / f"docs/images/{name}.svg").read_bytes()
    assert same, "run docs/draw_images.py and look at the pictures"


def test_reference_names_everything() -> None:
    reference = text_of("docs/reference.md")
    arguments = [name for name in inspect.signature(ps.Trainer).parameters if name != "task"]
    fields = list(ps.Result.__dataclass_fields__)
    for name in (*arguments, *fields, *PIPELINE_STRATEGIES, *BLOCKWISE_STRATEGIES):
        assert f"`{name}`" in reference, name
    members = [
        f"ps.{module}.{name}"
        for module in ("losses", "lr_schedules", "callbacks")
        for name, value in vars(getattr(ps, module)).items()
        if (inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, (ps.Callback, nn.Module))))
        and value.__module__.startswith(f"pipestill.{module}")
        and not name.startswith("_")
    ]
    assert {"ps.losses.SoftTarget", "ps.lr_schedules.cosine"} <= set(members)
    for name in (*ps.__all__, *members, "ps.callbacks.Terminal", "ps.callbacks.JsonLines", "ps.losses.Dino"):
        assert name in reference, name


def test_reference_names_every_json_field_of_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    line = re.search(r"^\| `simulate` \|.*$", text_of("docs/reference.md"), re.MULTILINE)
    assert line is not None
    assert set(simulated(capsys)) | {"picture"} == set(re.findall(r"`(\w+)`", line[0])) - {"simulate"}
