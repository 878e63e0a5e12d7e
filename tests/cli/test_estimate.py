"""Costs that are computed for a named device, on the command line; and memory limits of pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipestill.cli import main

pytestmark = pytest.mark.usefixtures("quick_plans")

SMALL = (
    "soft-target --preset imagenet100 --data noise --image_size 32 --teacher_width 32 --teacher_depth 3 --student_width 8 "
    "--student_depth 1 --batch_size 8"
)


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    status = main(words.split())
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def figures(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    status, out, err = run(capsys, f"{words} --json")
    assert status == 0, err
    read: dict[str, Any] = json.loads(out)
    return read


def test_a_plan_from_computed_costs_tells_memory_and_where_costs_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, f"plan {SMALL} --devices 2 --microbatches 4 --strategy fill --estimate a100")
    assert found["costs"].startswith("computed for a100 (tf32") and found["memory_limit_bytes"] is None
    chosen = next(one for one in found["considered"] if one["chosen"])
    assert len(chosen["memory_bytes"]) == 2 and min(chosen["memory_bytes"]) > 0
    status, out, _ = run(capsys, f"plan {SMALL} --devices 2 --microbatches 4 --strategy 1f1b --estimate a100")
    assert status == 0
    assert "memory" in out and "MiB" in out and "student blocks" in out and "costs computed for a100" in out


def test_a_limit_of_memory_is_kept_or_refused_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"plan {SMALL} --devices 2 --microbatches 4 --strategy gpipe --estimate a100"
    free = max(figures(capsys, command)["considered"][0]["memory_bytes"])
    kept = figures(capsys, f"{command} --memory {free}")
    assert kept["memory_limit_bytes"] == free and kept["chosen"] == "gpipe"
    status, _, err = run(capsys, f"{command} --memory {free // 2}")
    assert status == 2 and "would hold" in err and "of --memory" in err
    status, _, err = run(capsys, f"simulate {SMALL} --devices 2 --microbatches 4 --estimate a100 --memory 1KB")
    assert status == 2 and "would hold" in err


def test_computed_costs_in_a_file_give_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, f"profile {SMALL} --microbatches 4 --estimate h100:bf16 -o costs.json")
    assert status == 0 and "computed for h100 (bf16" in out and "stash" in out
    same = f"simulate {SMALL} --devices 2 --microbatches 4 --strategy 1f1b"
    read, computed = figures(capsys, f"{same} --costs costs.json"), figures(capsys, f"{same} --estimate h100:bf16")
    assert read == computed and read["costs"].startswith("computed for h100")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"plan {SMALL} --estimate a10", "no device 'a10' (did you mean 'a100'?)"),
        (f"plan {SMALL} --estimate a100 --costs x.json", "--estimate computes costs, and 'x.json' has them"),
        ("plan --costs x.json --estimate a100", "--estimate is for a recipe's models"),
        ("simulate --uniform 1,1,1,1 --estimate a100", "--estimate is for a recipe's models"),
        (f"profile {SMALL} --estimate a100 --devices 2", "--estimate measures nothing"),
        ("plan compress --estimate a100", "--estimate computes costs of pipelines"),
    ],
)
def test_what_cannot_be_computed_is_one_message_and_status_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, words)
    assert (status, out) == (2, "")
    assert message in err
