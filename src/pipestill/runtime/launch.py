"""Starts one process per rank on this machine, and ends them all when one of them fails."""

import multiprocessing as mp
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from pipestill.errors import PipestillError, RankFailure, TransportError, UserError
from pipestill.runtime.world import start_process_group

_GRACE_SECONDS = 1.0
_PRELOAD = ["pipestill.train.trainer", "torch._dynamo"]  # what every rank is going to import; optimizers import the second
_KILL_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of one rank."""

    rank: int
    message: str
    status: int
    """The exit status: 2 where the user's input is wrong, else 1."""
    detail: str
    """The traceback; empty for errors that explain themselves."""
    consequence: bool
    """Whether the rank failed only because another one did, as far as it can tell."""


def launch(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    num_ranks: int,
    *,
    device_type: str = "cpu",
    threads: int | None = None,
    timeout_seconds: float = 600.0,
) -> Any:
    """Call a function on every rank of a new group of processes on this machine.

    When a rank raises or dies, the others are ended within seconds. Ctrl-C ends all ranks, then raises `KeyboardInterrupt`.

    Args:
        target: the function; it is pickled, so it has to be importable.
        arguments: its arguments, which are pickled too.
        num_ranks: how many processes to start, each of which is one rank.
        device_type: "cpu" or "cuda", what the ranks' tensors are on.
        threads: CPU threads of each rank. Default: the cores, divided evenly.
        timeout_seconds: deadline of every wait of one rank for another.

    Returns:
        what `target` returned on rank 0.

    Raises:
        RankFailure: a rank failed; it holds the first cause.
    """
    context = mp.get_context("forkserver" if sys.platform.startswith("linux") else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = threads or max(1, (os.cpu_count() or 1) // num_ranks)
    processes: list[BaseProcess] = []
    reports: list[Connection] = []
    lifelines: list[Connection] = []
    try:
        for rank in range(num_ranks):
            report, theirs = context.Pipe(duplex=False)
            lifeline_end, lifeline = context.Pipe(duplex=False)
            settings = (rank, num_ranks, store.port, device_type, threads, timeout_seconds)
            process = context.Process(  # type: ignore[attr-defined]
                target=_rank_main, args=(target, arguments, settings, theirs, lifeline_end), name=f"pipestill-rank-{rank}"
            )
            process.start()
            theirs.close()
            lifeline_end.close()
            processes.append(process)
            reports.append(report)
            lifelines.append(lifeline)
        return _supervise(processes, reports)
    finally:
        _end(processes)
        for connection in (*reports, *lifelines):
            connection.close()


def _supervise(processes: list[BaseProcess], reports: list[Connection]) -> Any:
    """Wait until all ranks are done; once one has failed, raise the first cause."""
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    open_reports = dict(enumerate(reports))
    deadline: float | None = None
    while len(results) < len(processes) and (deadline is None or time.monotonic() < deadline):
        sentinels = [p.sentinel for r, p in enumerate(processes) if r in open_reports]
        wait([*open_reports.values(), *sentinels], timeout=0.2)
        for rank, report in list(open_reports.items()):
            ended = not processes[rank].is_alive()  # before the poll: a report sent last is then there to be read
            outcome = _read(report) or (_died(rank, processes[rank].exitcode) if ended else None)
            if outcome is None:
                continue
            del open_reports[rank]
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                results[rank] = outcome[0]
        if failures and deadline is None:
            deadline = time.monotonic() + _GRACE_SECONDS
        if failures and (not open_reports or any(not f.consequence for f in failures)):
            break
    if failures:
        named = next((f for f in failures if not f.detail), failures[0])  # one that says what it was waiting for
        first = next((f for f in failures if not f.consequence), named)
        raise RankFailure(first.message, status=first.status, detail=first.detail)
    return results[0]


def _read(report: Connection) -> Failure | tuple[Any] | None:
    """Read what a rank has reported: its failure, or what it returned as a tuple of one; None where nothing has come yet."""
    try:
        outcome: Failure | tuple[Any] | None = pickle.loads(report.recv_bytes()) if report.poll() else None
        return outcome
    except (EOFError, OSError):
        return None


def _died(rank: int, exitcode: int | None) -> Failure:
    """The failure of a rank whose process ended without a report."""
    how = f"ended with status {exitcode} without a message"
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        how = f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return Failure(rank, f"rank {rank} {how}", 1, "", consequence=False)


def _end(processes: list[BaseProcess]) -> None:
    """End every process that is still alive."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + _KILL_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _rank_main(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    settings: tuple[int, int, int, str, int, float],
    report: Connection,
    lifeline: Connection,
) -> None:
    """Run one rank: join the process group, call the target, report what it returned or how it failed."""
    import torch
    import torch.distributed as dist

    rank, num_ranks, port, device_type, threads, timeout_seconds = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides; it gets the same Ctrl-C
    threading.Thread(target=_die_with_launcher, args=(lifeline,), daemon=True).start()
    try:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.set_num_threads(threads)
        store = TCPStore("127.0.0.1", port, is_master=False)
        start_process_group(device_type, timeout_seconds, store=store, rank=rank, world_size=num_ranks)
        result = target(*arguments)
        dist.barrier()
        report.send_bytes(pickle.dumps((result if rank == 0 else None,)))  # by value: this process is about to end
    except BaseException as error:
        report.send_bytes(pickle.dumps(failure_of(rank, error)))
        report.close()
        sys.stdout.flush()
        os._exit(1)  # threads and sockets of a broken run must not hold the exit
    dist.destroy_process_group()


def failure_of(rank: int, error: BaseException) -> Failure:
    """The report of a rank about the exception that ended it."""
    status = 2 if isinstance(error, UserError) else 1
    known = isinstance(error, PipestillError)
    message = str(error) if known else f"rank {rank} failed: {type(error).__name__}: {error}"
    detail = "" if known else "".join(traceback.format_exception(error))
    return Failure(rank, message, status, detail, consequence=has_lost_peer(error))


def has_lost_peer(error: BaseException) -> bool:
    """Whether a rank failed only because another one did, as far as it can tell."""
    return isinstance(error, (TransportError, DistError)) or "gloo/transport" in str(error)


def _die_with_launcher(lifeline: Connection) -> None:
    """End this process when the launcher's end of the pipe closes, which happens however it dies."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)
