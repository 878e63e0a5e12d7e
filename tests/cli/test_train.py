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


def test_preflight_refuses_without_asserts_what_it_refuses_with_them() -> None:
    commands = [["train", "soft-target", "--devices", "2", *SMALL, *words.split()] for words in REFUSED]
    plain, without_asserts = (
        subprocess.run(
            [sys.executable, *flags, "-c", RUN_ALL, json.dumps(commands)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for flags in ([], ["-O"])
    )
    assert plain == without_asserts
    for line, problem in zip(plain, REFUSED.values(), strict=True):
        status, message = json.loads(line)
        assert status == 2 and problem in message
    assert not Path("runs").exists() or not list(Path("runs").iterdir()), "nothing is left of a run that cannot be"


def test_a_limit_of_memory_is_kept_by_pipelines_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "soft-target", "--devices", "2", *SMALL]
    assert main([*words, "--memory", "1KB"]) == 2
    assert "than the 0.00" in capsys.readouterr().err
    assert main([*words, "--memory", "1GB", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 45
