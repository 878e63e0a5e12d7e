"""Older versions of weights, and a teacher that follows its student."""

import pytest
import torch
from torch import nn

import pipestill as ps
from pipestill.runtime.pipeline.reference import PreviousWeights
from pipestill.runtime.pipeline.weights import MovingAverage, Versions


def update(parameter: nn.Parameter, versions: Versions) -> None:
    with versions.next(), torch.no_grad():
        parameter.add_(1.0)


def test_steps_read_the_version_before_and_the_first_ones_the_first() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    versions = Versions([parameter], staleness=1)
    read = []
    for step in range(4):
        with versions.of(step):
            read.append(parameter.item())
        assert parameter.item() == step  # the newest again
        update(parameter, versions)
    assert read == [0.0, 0.0, 1.0, 2.0]
    assert len(versions.old) == 1


def test_without_staleness_no_version_is_kept() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    versions = Versions([parameter], staleness=0)
    update(parameter, versions)
    with versions.of(5):
        assert parameter.item() == 1.0
    assert not versions.old


def test_a_graph_from_before_an_update_keeps_what_it_saved() -> None:
    parameter = nn.Parameter(torch.full((1,), 3.0))
    versions = Versions([parameter], staleness=1)
    output = parameter * parameter
    update(parameter, versions)
    with versions.of(1):
        output.backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 6.0


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_reference_reads_the_same_versions(staleness: int) -> None:
    weight = torch.zeros(1)
    previous = PreviousWeights([weight], staleness)
    read = []
    for _ in range(3):
        with previous.for_reading():
            read.append(weight.item())
        with previous.updated():
            weight.add_(1.0)
    assert read == ([0.0, 0.0, 1.0] if staleness else [0.0, 1.0, 2.0])
    assert weight.item() == 3.0


def test_weights_are_put_back_where_a_forward_fails() -> None:
    weight = torch.zeros(1)
    previous = PreviousWeights([weight], 1)
    with previous.updated():
        weight.add_(1.0)
    with pytest.raises(ZeroDivisionError), previous.for_reading():
        raise ZeroDivisionError
    assert weight.item() == 1.0


@pytest.mark.parametrize("buffers", ["own", "copy"])
def test_a_teacher_follows_weights_and_copies_noted_buffers(buffers: str) -> None:
    teacher, student = (nn.Sequential(nn.BatchNorm1d(2)) for _ in range(2))
    task = ps.Momentum(teacher, student, ps.losses.byol, momentum=0.75, teacher_buffers=buffers)
    average = MovingAverage(task, range(1))
    with torch.no_grad():
        student[0].weight.fill_(5.0)
        student[0].running_mean.fill_(2.0)
        average.note()
        student[0].running_mean.fill_(9.0)  # by a forward of the next step
        average.move(0)
    assert teacher[0].weight.tolist() == [2.0, 2.0]  # 0.75 * 1 + 0.25 * 5
    assert teacher[0].running_mean.tolist() == ([2.0, 2.0] if buffers == "copy" else [0.0, 0.0])
