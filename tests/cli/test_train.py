from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipestill.cli import main

SMALL = ["--batch_size", "32", "--teacher_epochs", "1", "--epochs", "1", "--microbatches", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


REFUSED = {
    "--student_partition 9,9": "student partition [9, 9] adds up to 18, but the student has 5 blocks",
    "--strategy gpipe --stash 2": "stash",
    "--costs made.csv": "costs 'made.csv' are of models that are trained block by block",
}
"""Options that are wrong, and what the message says."""

RUN_ALL = """
import contextlib, io, json, sys
from pipestill.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = main(words)
    print(json.dumps([status, told.getvalue().splitlines()[-1]]))
"""
COMMANDS = [["train", "soft-target", "--devices", "2", *SMALL, *words.split()] for words in REFUSED]


def test_preflight_refuses_before_anything_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    for words, problem in zip(COMMANDS, REFUSED.values(), strict=True):
        assert main(words) == 2
        assert problem in capsys.readouterr().err
    assert not Path("runs").exists() or not list(Path("runs").iterdir()), "nothing is left of a run that cannot be"


@pytest.mark.slow
def test_preflight_refuses_without_asserts_what_it_refuses_with_them() -> None:
    """`tests/train/test_trainer.py` has more refusals, and is quicker."""
    command = [sys.executable, "-O", "-c", RUN_ALL, json.dumps(COMMANDS)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, problem in zip(told, REFUSED.values(), strict=True):
        status, message = json.loads(line)
        assert status == 2 and problem in message


def test_a_limit_of_memory_is_kept_by_pipelines_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "soft-target", *SMALL, "--batch_size", "480", "--teacher_width", "4"]
    assert main([*words, "--devices", "2", "--memory", "1KB"]) == 2
    assert "than the 0.00" in capsys.readouterr().err
    assert main([*words, "--memory", "1GB", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 3
