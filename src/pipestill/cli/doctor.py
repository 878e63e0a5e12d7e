"""`pipestill doctor`: what this machine has, what is missing, how to mend it."""

import json
import os
import platform
import resource
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from pipestill.cli.options import parse
from pipestill.cli.recipes import missing_packages
from pipestill.recipes import RECIPES


@dataclass(frozen=True)
class DoctorOptions:
    """How the report is printed.

    Args:
        json: print everything as one JSON object
    """

    json: bool = False


@dataclass(frozen=True)
class Finding:
    """One line of the report. `state`: ok, warn (something is slower or missing) or bad (nothing will run)."""

    what: str
    state: str
    found: str
    remedy: str = ""


def run(words: list[str]) -> int:
    """Run the command; status 1 when something would keep a run from working."""
    (options,) = parse("doctor", words, DoctorOptions)
    packages = ("pipestill", "torch", "numpy", "jsonargparse", "rich", "matplotlib", "safetensors")
    findings = [Finding("Python", "ok", platform.python_version()), *map(_package, packages)]
    findings += [*_hardware(), _launch(), *_recipes()]
    bad = any(f.state == "bad" for f in findings)
    if options.json:
        print(json.dumps({"healthy": not bad, "findings": [asdict(f) for f in findings]}))
        return int(bad)
    table = Table("", "what", "found", "what to do")
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "bad": "[red]bad[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, finding.found, finding.remedy)
    Console().print(table)
    return int(bad)


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "bad", "not installed", install(name))


def _hardware() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [Finding("CPU cores", "ok", str(cores))]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        findings.append(Finding("CUDA devices", "ok", f"{len(names)}: {', '.join(sorted(set(names)))}"))
        nccl = torch.distributed.is_nccl_available()
        findings.append(Finding("NCCL", "ok" if nccl else "bad", "there" if nccl else "not in this torch"))
    else:
        findings.append(Finding("CUDA devices", "warn", "none", "runs on CPU processes; for GPUs install a CUDA build of torch"))
    free = shutil.disk_usage(".").free
    low = free < 2 * 2**30
    findings.append(
        Finding("disk space here", "warn" if low else "ok", f"{free / 2**30:.0f} GiB", "runs write here" if low else "")
    )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 < files < 1024
    findings.append(Finding("open files", "warn" if few else "ok", str(files), "ulimit -n 4096" if few else ""))
    return findings


def _launch() -> Finding:
    """Start two ranks and let them meet."""
    from pipestill.errors import PipestillError
    from pipestill.runtime.launch import launch

    try:
        total = launch(_meet, (), 2, threads=1, timeout_seconds=60)
    except (PipestillError, OSError) as error:
        return Finding("two gloo processes", "bad", str(error), "is loopback networking allowed here?")
    return Finding("two gloo processes", "ok" if total == 1 else "bad", "start, meet and end")


def _meet() -> int:
    import torch
    import torch.distributed as dist

    mine = torch.tensor([dist.get_rank()])
    dist.all_reduce(mine)
    return int(mine)


def _recipes() -> list[Finding]:
    findings = []
    for name, entry in RECIPES.items():
        missing = missing_packages(entry.needs)
        state, found = ("warn", f"lacks {', '.join(missing)}") if missing else ("ok", "ready")
        findings.append(Finding(f"recipe {name}", state, found, install(*missing) if missing else ""))
    return findings


def install(*packages: str) -> str:
    """The command that installs packages for the Python that runs this."""
    return f"{sys.executable} -m pip install {' '.join(packages)}"
