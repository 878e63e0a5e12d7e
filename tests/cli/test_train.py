from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipestill.cli import main

SMALL = ["--batch_size", "32", "--teacher_epochs", "1", "--epochs", "1", "--microbatches", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--student_partition 9,9", "student partition [9, 9] adds up to 18, but the student has 5 blocks"),
        ("--strategy gpipe --stash 2", "stash"),
        ("--costs made.csv", "costs 'made.csv' are of models that are trained block by block"),
    ],
)
def test_preflight_refuses_without_asserts_what_it_refuses_with_them(words: str, problem: str) -> None:
    command = ["-m", "pipestill", "train", "soft-target", "--devices", "2", *SMALL, *words.split()]
    told = []
    for flags in ([], ["-O"]):
        done = subprocess.run([sys.executable, *flags, *command], capture_output=True, text=True, env=dict(os.environ))
        told.append((done.returncode, done.stderr.splitlines()[-1]))
        assert not Path("runs").exists() or not list(Path("runs").iterdir()), "nothing is left of a run that cannot be"
    assert told[0] == told[1]
    assert told[0][0] == 2 and problem in told[0][1], told


def test_a_limit_of_memory_is_kept_by_pipelines_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "soft-target", "--devices", "2", *SMALL]
    assert main([*words, "--memory", "1KB"]) == 2
    assert "than the 0.00" in capsys.readouterr().err
    assert main([*words, "--memory", "1GB", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 45
