"""Whatever fails on whichever rank, all ranks end soon and the first cause is told."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import targets
from torch import nn

import pipestill as ps
from pipestill.errors import ModelError, RankFailure, TrainingError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

BOUND_SECONDS = 10.0


def pids(directory: Path) -> list[int]:
    return [int(path.read_text()) for path in directory.glob("rank-*")]


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def fail(target: object, *arguments: object, directory: Path, devices: int) -> RankFailure:
    """Launch what fails; check that all of it is gone in time, and return what the launcher says."""
    with pytest.raises(RankFailure) as caught:
        ps.launch(target, arguments, devices, threads=1, timeout_seconds=30.0)  # type: ignore[arg-type]
    struck = directory / "struck"
    if struck.exists():
        assert time.monotonic() - float(struck.read_text()) < BOUND_SECONDS
    assert len(pids(directory)) == devices
    assert not any(map(is_alive, pids(directory)))
    return caught.value


FIRST_CAUSES = [
    ("block", "raise", 1, "rank 1 failed: ZeroDivisionError: struck", 1),
    ("block", "user error", 1, "struck by the user", 2),
    ("block", "kill", 0, r"rank 0 was killed by SIGKILL \(out of memory\?\)", 1),
    ("block", "exit", 1, "rank 1 ended with status 3 without a message", 1),
    ("loss", "nan", 2, r"the loss is not finite in step 2 \(soft_target inf, cross_entropy nan\)", 1),
    ("loader", "raise", 0, "the loader failed: ZeroDivisionError: struck .*targets.py", 1),
]
"""Each way to fail once: an exception, wrong input, a kill, an exit without a message, and those of the loss and the loader."""

MORE_CAUSES = [
    ("block", "raise", 0, "rank 0 failed: ZeroDivisionError: struck", 1),
    ("block", "grow", 0, r"after student block 0 \('0'\): the tensor .* was float32 \(4, 4\) .* now float32 \(4, 8\)", 2),
    ("block", "nan", 0, r"the loss is not finite in step 1 \(soft_target nan, cross_entropy nan\)", 1),
    ("block", "kill", 1, "rank 1 was killed by SIGKILL", 1),
    ("block", "kill", 2, "rank 2 was killed by SIGKILL", 1),
    ("block", "sys.exit", 1, "rank 1 failed: SystemExit: 3", 1),
    ("loss", "raise", 2, "rank 2 failed: ZeroDivisionError: struck", 1),
    ("loss", "parts", 2, "the loss had the parts soft_target, cross_entropy .* now has soft_target, another", 2),
    ("loader", "no rows", 0, "batch 3 has no rows", 2),
    ("loader", "user error", 0, "struck by the user", 2),
]
"""The same ways on other ranks and in other places."""


@pytest.mark.parametrize(
    ("place", "how", "where", "message", "status"),
    [*FIRST_CAUSES, *(pytest.param(*cause, marks=pytest.mark.slow) for cause in MORE_CAUSES)],
)
def test_the_first_cause_is_told(place: str, how: str, where: int, message: str, status: int, tmp_path: Path) -> None:
    failure = fail(targets.train, place, how, where, str(tmp_path), 3, directory=tmp_path, devices=3)
    assert re.search(message, str(failure)), str(failure)
    assert failure.status == status
    if "ZeroDivisionError" in message and place != "loader":
        assert "targets.py" in failure.detail  # the rank's own traceback


STRUCK_OUTSIDE = [("kill", 0), ("kill", 2), ("raise", 1), ("raise", 2)]


@pytest.mark.parametrize("how", ["hang", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_found_at_the_deadline(how: str, tmp_path: Path) -> None:
    failure = fail(targets.train, "block", how, 1, str(tmp_path), 3, 2.0, directory=tmp_path, devices=3)
    assert "rank 1" in str(failure)
    assert "(deadline 2 s)" in str(failure)
    assert failure.status == 1


@pytest.mark.parametrize(
    ("how", "where"), [("kill", 1), ("raise", 0), *(pytest.param(*one, marks=pytest.mark.slow) for one in STRUCK_OUTSIDE)]
)
def test_outside_the_schedule_too(how: str, where: int, tmp_path: Path) -> None:
    failure = fail(targets.strike_in_a_collective, how, where, str(tmp_path), directory=tmp_path, devices=3)
    message = {"kill": "was killed by SIGKILL", "raise": "failed: ZeroDivisionError"}[how]
    assert f"rank {where} {message}" in str(failure)


# ---------------------------------------------------------------- the launcher itself

SCRIPT = """
import signal
from support.waiting import print_and_wait
from pipestill.runtime import launch
launch._PRELOAD = ["pipestill.runtime.launch"]  # these ranks train nothing
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have background jobs ignore
try:
    launch.launch(print_and_wait, (), 2, threads=1)
except KeyboardInterrupt:
    launch.launch(print_and_wait, (), 2, threads=1)
"""


def start_script() -> "subprocess.Popen[str]":
    """A launcher with two ranks that wait, and, once it has been interrupted, with two new ones."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
    )


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """The process ids of a launcher's ranks, once both are there."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(2)]


def gone(processes: list[int], seconds: float) -> bool:
    """Whether all processes end within `seconds`."""
    deadline = time.monotonic() + seconds
    for pid in processes:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
        finally:
            os.close(handle)
    return True


def test_ranks_end_with_an_interrupt_and_with_their_launcher() -> None:
    """Ctrl-C raises `KeyboardInterrupt` once all ranks are gone; the launcher's own end leaves none behind."""
    process = start_script()
    interrupted = ranks_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert gone(interrupted, BOUND_SECONDS)
    left = ranks_of(process)
    process.kill()
    process.wait()
    assert gone(left, BOUND_SECONDS)


# ---------------------------------------------------------------- in one process


def weights_after(error: type[Exception], task: ps.Supervised, x: torch.Tensor) -> list[bool]:
    before = [p.detach().clone() for p in task.student.parameters()]
    trainer = ps.Trainer(task, devices=2, microbatches=2, device="cpu", timeout_seconds=30.0)
    with pytest.raises(error):
        trainer.fit([(x, torch.zeros(len(x), dtype=torch.int64))])
    return [torch.equal(a, b) for a, b in zip(before, task.student.parameters(), strict=True)]


def test_a_loss_that_is_not_finite_makes_no_update() -> None:
    x = torch.randn(6, 4)
    x[5] = float("inf")
    task = ps.Supervised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), ps.losses.cross_entropy)
    assert all(weights_after(TrainingError, task, x))


def test_a_user_error_in_one_process_is_raised_as_it_is() -> None:
    task = ps.Supervised(nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 3)), ps.losses.cross_entropy)
    assert all(weights_after(ModelError, task, torch.randn(6, 4)))
