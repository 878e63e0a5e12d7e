"""Losses of microbatches that do not add up to that of their batch are refused; sound ones never are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.losses import SoftTarget, counted
from pipestill.model.dry_run import dry_run

CLASSES = 5
X, Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 4])
SEQUENCES = torch.tensor([[0, 1, -100], [2, -100, -100], [3, 4, 1]])


def model(*, dropped: bool = False, classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(len(str(dropped)))
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5) if dropped else nn.Tanh(), nn.Linear(8, classes)]
    return nn.Sequential(*layers)


def tried(
    loss: Callable[..., Any], targets: Any = Y, *, classes: int = CLASSES, dtype: torch.dtype = torch.float32, **task: Any
) -> None:
    teacher, student = model(classes=classes).to(dtype), model(dropped=True, classes=classes).to(dtype)
    dry_run(ps.Distillation(teacher, student, loss, **task), X.to(dtype), targets)


def relations(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    def distances(output: Tensor) -> Tensor:
        between = F.pdist(output)
        return between / between.mean()

    return F.smooth_l1_loss(distances(student), distances(teacher))


def contrast(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    return F.cross_entropy(student @ teacher.t(), torch.arange(len(student)))


def of_tokens(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student.unflatten(1, (3, -1)).flatten(0, 1), target.flatten())


def of_classes(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student, target, torch.tensor([1.0, 3.0, 1.0, 1.0, 9.0]))


@pytest.mark.parametrize(
    ("loss", "targets", "classes"),
    [(relations, Y, 5), (contrast, Y, 5), (of_tokens, SEQUENCES, 15), (of_classes, Y, 5)],
    ids=["distances between samples", "other samples as negatives", "uneven labels", "class weights"],
)
def test_a_loss_coupled_over_rows_is_refused(loss: Callable[..., Any], targets: Tensor, classes: int) -> None:
    with pytest.raises(ModelError, match=r"\('loss'\) of 5 rows is .*, and the mean .* batch_loss=True"):
        tried(loss, targets, classes=classes)
    tried(loss, targets, classes=classes, batch_loss=True)


def test_a_mean_that_some_rows_have_none_of_is_refused() -> None:
    """It would be NaN on such a microbatch, in the middle of a run."""
    with pytest.raises(ModelError, match="of 2 and of 3 of them is nan"):
        tried(of_tokens, torch.tensor([[-100] * 3, [-100] * 3, [1, 2, 0]]), classes=15)


class Bank(nn.Module):
    """Remembers the teacher's outputs after it has used them, as memory banks do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(CLASSES))

    def forward(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        loss = F.mse_loss(student, teacher - self.mean)
        self.mean.add_(teacher.mean(0))
        return loss


class Remembering:
    """Changes with every call."""

    calls = 0

    def __call__(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        self.calls += 1
        return F.mse_loss(student, teacher) * self.calls


def noisy(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    return F.mse_loss(student + torch.randn_like(student), teacher)


def writes(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    return F.mse_loss(student, teacher.mul_(0.5))


def cancels(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    """All but 0, of terms that are not."""
    return (student - student.detach()).mean() * 1e4 + 1e-7 * student.mean()


def agrees(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    """The divergence of a model from itself: rounding, times T^2."""
    log_p, log_q = ((student.float() * scale / 4).log_softmax(-1) for scale in (1, 1 + 1e-6))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * 16


SOUND: dict[str, Callable[..., Any]] = {
    "soft target": SoftTarget(), "logits": ps.losses.LogitsMSE(), "cosine": ps.losses.Cosine(), "a bank": Bank(),
    "remembering": Remembering(), "noisy": noisy, "writes": writes, "cancels": cancels, "agrees": agrees,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", SOUND)
def test_no_sound_loss_is_refused(loss: str, dtype: torch.dtype) -> None:
    tried(SOUND[loss], dtype=dtype)


def test_sound_losses_of_tokens_are_not_refused() -> None:
    tried(lambda s, t, y: SoftTarget()(s.unflatten(1, (3, -1)), t.unflatten(1, (3, -1)), y.clamp(min=0)), SEQUENCES, classes=15)


def test_feature_losses_that_compare_rows_are_refused() -> None:
    def pairwise(student: Tensor, teacher: Tensor) -> Tensor:
        return relations(student, teacher, None)

    teacher, student = model(), model(dropped=True)
    for features, sound in (({"2": "2"}, F.mse_loss), ({"2": "1"}, F.mse_loss), ({"2": "2"}, pairwise)):
        task: dict[str, Any] = {"features": ps.features(features, loss=sound, project=True)}
        if sound is pairwise:
            with pytest.raises(ModelError, match=r"\('features.*'\) of 5 rows is .* batch_loss=True"):
                dry_run(ps.Distillation(teacher, student, SoftTarget(), **task), X, Y)
            task["batch_loss"] = True
        dry_run(ps.Distillation(teacher, student, SoftTarget(), **task), X, Y)


def test_batch_norm_in_a_projector_is_not_held_against_its_loss() -> None:
    projector = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    features = ps.features({"2": "2"}, loss=F.mse_loss, project=projector)
    dry_run(ps.Distillation(model(), model(dropped=True), SoftTarget(), features=features), X, Y)
    assert projector[1].training
    assert projector[1].num_batches_tracked == 0


def test_counts_must_add_up() -> None:
    loss = counted(lambda s, t, y: F.cross_entropy(s, y, reduction="sum"), lambda y: (y > 0).double().mean())
    with pytest.raises(ModelError, match=r"counts\(target\) gave 0.5 for 'loss' of 2 rows, .* of 3 others, and 0.6 of all 5"):
        tried(loss)


def test_counted_parts_must_be_sums() -> None:
    loss = counted(lambda s, t, y: F.cross_entropy(s, y), lambda y: len(y))
    with pytest.raises(ModelError, match="the loss counts its part 'loss', so it has to be a sum .* add up, do not average"):
        tried(loss)


def test_counts_must_name_parts_of_the_loss() -> None:
    loss = counted(lambda s, t, y: {"labels": F.cross_entropy(s, y, reduction="sum")}, lambda y: {"label": len(y)})
    with pytest.raises(ModelError, match=r"counts\(target\) names label, and the loss has the parts labels"):
        tried(loss)
    changing = counted(lambda s, t, y: {"a": s.sum(), "b": s.sum()}, lambda y: {"a" if len(y) == 2 else "b": len(y)})
    with pytest.raises(ModelError, match="gave a count for a and, for other rows, for b"):
        tried(changing)
