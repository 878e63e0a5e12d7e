"""Prints what preflight says of trainers that cannot be, a line each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pipestill as ps
from support.blocks import Chain, profile_of
from support.cases import distilled
from support.fits import unit_costs
from support.models import CLASSES, vectors


def net() -> list[nn.Module]:
    return [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES)]


def pipeline(loader: Any = None, **options: Any) -> None:
    task = options.pop("task", None) or distilled(*net())
    options = {"costs": unit_costs(task), "devices": 2, "microbatches": 2, "device": "cpu", **options}
    ps.Trainer(task, **options).preflight(vectors((6,)) if loader is None else loader)


def momentum(**options: Any) -> None:
    student = nn.Sequential(*net())
    task = ps.Momentum(copy.deepcopy(student[:2]), student, lambda mine, theirs, target: mine[0].square().mean())
    batch = torch.zeros(6, 4)
    pipeline(task=task, loader=[((batch, batch), None)], **options)


def blockwise(**options: Any) -> None:
    task = ps.Blockwise(*(Chain([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2)))
    ps.Trainer(task, **{"costs": profile_of(2), "devices": 2, "device": "cpu", **options}).preflight([torch.zeros(6, 4)])


def tied() -> ps.Distillation:
    task = distilled(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    task.student[2].weight = task.student[1].weight
    return task


CASES: list[Callable[[], None]] = [
    pipeline,
    momentum,
    blockwise,
    lambda: pipeline(task=tied(), student_partition=[2, 2]),
    lambda: pipeline(devices=9),
    lambda: pipeline(strategy="gpipe", run_ahead=1),
    lambda: pipeline(strategy="1f1b", stash=3),
    lambda: pipeline(stash=0),
    lambda: pipeline(run_ahead=-1),
    lambda: pipeline(strategy="async"),
    lambda: pipeline(student_partition=[1, 1]),
    lambda: pipeline(student_partition=[0, 4]),
    lambda: pipeline(costs=ps.Costs.uniform(3, 1, 1, 1)),
    lambda: pipeline(memory="1KB"),
    lambda: pipeline(loader=[(torch.zeros(3, 5), torch.zeros(3).long())]),
    lambda: pipeline(loader=[]),
    lambda: pipeline(lr_schedule=lambda step: -1.0),
    lambda: pipeline(optimizer=lambda parameters, lr: None, lr_schedule=lambda optimizer: None),
    lambda: momentum(student_partition=[2, 2], teacher_partition=[2, 0]),
    lambda: momentum(strategy="1f1b", staleness=1),
    lambda: blockwise(memory=1000),
    lambda: blockwise(costs=ps.BlockProfile(profile_of(2).blocks[:1])),
    lambda: blockwise(microbatches=2),
    lambda: blockwise(strategy="fill"),
]


def main() -> None:
    torch.manual_seed(0)
    for number, case in enumerate(CASES):
        try:
            case()
            print(number, "accepted")
        except ps.UserError as error:
            print(number, type(error).__name__, str(error).replace("\n", " "))
