"""One batch in 1 and in several microbatches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import CASES, distilled, supervised
from support.models import CLASSES, vectors
from torch import Tensor, nn

import pipestill as ps
from pipestill.model.dry_run import dry_run
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.one_batch import MicrobatchDifference, microbatch_difference


def difference(task: Any, microbatches: int = 3, **options: Any) -> MicrobatchDifference:
    ((inputs, targets),) = vectors((10,))
    contracts = dry_run(task, inputs[:3], targets[:3])
    batch = Batch(10, 0, True, inputs, targets, counts=task.loss_counts(targets))
    return microbatch_difference(task, contracts, batch, microbatches, **{"frozen_norms": False, **options})


@pytest.mark.parametrize("microbatches", [1, 3, 16])
def test_a_sound_loss_differs_by_rounding(microbatches: int) -> None:
    found = difference(distilled(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)), microbatches)
    assert found.relative is not None
    assert found.relative < 1e-6
    assert (found.relative == 0.0) == (microbatches == 1)


def test_heads_inside_the_loss() -> None:
    task = distilled(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    found = difference(ps.Distillation(task.teacher, task.student, ps.losses.SoftTarget(), fuse_heads=True))
    assert found.relative is not None
    assert found.relative < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_feature_losses_count_too(fused: bool) -> None:
    task = distilled(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    projector = nn.Linear(8, 8)
    features = ps.features({"0": "0"}, loss=F.mse_loss, project=projector)
    fused_task = ps.Distillation(task.teacher, task.student, ps.losses.SoftTarget(), features=features, fuse_heads=fused)
    found = difference(fused_task)
    assert found.relative is not None
    assert found.relative < 1e-6
    features = ps.features({"0": "0"}, loss=F.mse_loss, project=nn.Sequential(projector, nn.BatchNorm1d(8)))
    found = difference(ps.Distillation(task.teacher, task.student, ps.losses.SoftTarget(), features=features))
    assert "batch norm ('1' of features" in found.reason


def test_what_depends_on_the_microbatch_shows() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    found = difference(supervised(nn.Linear(4, 8), Centred(), nn.Linear(8, CLASSES)))
    assert found.relative is not None
    assert found.relative > 0.01


def test_batch_norm_makes_it_meaningless_unless_frozen() -> None:
    task = supervised(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    found = difference(task)
    assert found.relative is None
    assert "batch norm ('1' of the student) normalises over the rows of a microbatch" in found.reason
    frozen = difference(task, frozen_norms=True)
    assert frozen.relative is not None
    assert frozen.relative < 1e-6


def test_random_losses_are_not_compared() -> None:
    found = difference(CASES["random_loss"].task())
    assert found == MicrobatchDifference(None, "the loss or the teacher draws random numbers, anew for each microbatch")


def test_it_leaves_no_trace() -> None:
    task = CASES["centered_loss"].task()
    modes, seed = [m.training for m in task.student.modules()], torch.random.get_rng_state()
    difference(task)
    assert not task.loss.center.any()
    assert all(p.grad is None for p in task.student.parameters())
    assert [m.training for m in task.student.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_a_batch_loss_is_the_same_in_any_microbatches() -> None:
    def contrast(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(student @ teacher.t(), torch.arange(len(student)))

    task = distilled(nn.Linear(4, 8), nn.Linear(8, CLASSES))
    found = difference(ps.Distillation(task.teacher, task.student, contrast, batch_loss=True))
    assert found.relative is not None
    assert found.relative < 1e-6
