"""The reference is the plain loop that anybody would write."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fits import Listener
from support.models import images
from torch import Tensor, nn

import pipestill as ps


def models() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(1)
    student = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 5)
    )
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 5))
    return teacher, student


def loss(learnt: Tensor, taught: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The means over rows that anybody would write."""
    soft = F.kl_div(F.log_softmax(learnt / 2, -1), F.log_softmax(taught / 2, -1), reduction="batchmean", log_target=True)
    return {"soft_target": soft * (0.5 * 2 * 2), "cross_entropy": F.cross_entropy(learnt, target)}


def plain_loop(teacher: nn.Module, student: nn.Module, microbatches: int, epochs: int) -> list[float]:
    """Without a line of Pipestill."""
    teacher.eval()
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    losses = []
    for _ in range(epochs):
        for x, y in images():
            optimizer.zero_grad()
            total = 0.0
            parts_of_batch = zip(torch.tensor_split(x, microbatches), torch.tensor_split(y, microbatches), strict=True)
            for inputs, target in parts_of_batch:
                if len(inputs) == 0:
                    continue
                with torch.no_grad():
                    taught = teacher(inputs)
                learnt = student(inputs)
                parts = torch.stack(list(loss(learnt, taught, target).values()))
                (parts.sum() * (len(inputs) / len(x))).backward()
                total += float(parts.detach().double().sum()) * len(inputs) / len(x)
            optimizer.step()
            schedule.step()
            losses.append(total)
    return losses


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("strategy", ["reference", "fill"])
def test_it_equals_a_loop_without_pipestill(strategy: str, microbatches: int) -> None:
    teacher, student = models()
    expected = copy.deepcopy(student)
    losses = plain_loop(copy.deepcopy(teacher), expected, microbatches, epochs=2)
    listener = Listener()
    options: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 0.01, "lr_schedule": lambda step: 0.9**step}
    task = ps.Distillation(teacher, student, loss)
    ps.Trainer(
        task, strategy=strategy, devices=3 if strategy == "fill" else 1, microbatches=microbatches, log_every=1,
        device="cpu", callbacks=[listener], **options,
    ).fit(images(), epochs=2)  # fmt: skip
    for name, tensor in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    assert [values["loss"] for values in listener.steps] == pytest.approx(losses, rel=1e-6)


def test_the_teacher_never_changes() -> None:
    teacher, student = models()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    ps.Trainer(ps.Distillation(teacher, student, ps.losses.SoftTarget()), devices=2, device="cpu").fit(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
