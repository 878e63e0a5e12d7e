from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest

from pipestill.cli import doctor, main
from pipestill.errors import RankFailure


@pytest.fixture(autouse=True)
def ranks_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that meet without being started."""
    monkeypatch.setattr("pipestill.runtime.launch.launch", lambda *arguments, **options: 1)


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is (status == 0)
    return status, {finding["what"]: finding for finding in told["findings"]}


def test_a_machine_that_has_everything_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys)
    assert status == 0
    assert {found[what]["state"] for what in ("Python", "torch", "CPU cores", "two gloo processes")} == {"ok"}
    assert found["recipe soft-target"]["found"] == "ready"


def test_a_missing_dependency_is_bad_and_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "safetensors":
            raise PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    status, found = report(capsys)
    assert status == 1
    assert found["safetensors"]["state"] == "bad"
    assert found["safetensors"]["remedy"] == f"{sys.executable} -m pip install safetensors"


def test_a_recipe_that_lacks_packages_is_noted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "missing_packages", lambda needs: [need for need in needs if need == "tokenizers"])
    status, found = report(capsys)
    assert status == 0, "the other recipes run"
    assert found["recipe distilbert"]["found"] == "lacks tokenizers"
    assert found["recipe distilbert"]["remedy"].endswith("-m pip install tokenizers")


def test_ranks_that_cannot_meet_are_bad(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*arguments: object, **options: object) -> int:
        raise RankFailure("rank 1 never came")

    monkeypatch.setattr("pipestill.runtime.launch.launch", launch)
    status, found = report(capsys)
    assert status == 1
    assert found["two gloo processes"]["found"] == "rank 1 never came"


def test_little_space_and_few_files_are_noted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2**30))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 256))
    status, found = report(capsys)
    assert status == 0
    assert (found["disk space here"]["state"], found["open files"]["state"]) == ("warn", "warn")
    assert found["open files"]["remedy"] == "ulimit -n 4096"


def test_the_table_shows_every_finding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "two gloo processes" in told and "recipe nas" in told
