"""What a look before the first step says, and what it warns of."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import linears
from support.models import CLASSES, vectors
from torch import Tensor, nn

import pipestill as ps
from pipestill.model.first_look import FirstLook, first_look
from pipestill.train.callbacks import Callback

X = torch.eye(CLASSES).repeat(3, 1)
Y = torch.arange(CLASSES).repeat(3)


def knowing() -> nn.Sequential:
    """A teacher that is right about each row of X."""
    model = nn.Sequential(nn.Linear(CLASSES, CLASSES, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(CLASSES) * 5)
    return model


def student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*linears(CLASSES, 8, CLASSES))


def look(loss: Any, teacher: nn.Module | None = None, model: nn.Module | None = None) -> FirstLook:
    return first_look(ps.Distillation(teacher or knowing(), model or student(), loss), X, Y)


@pytest.mark.parametrize("loss", [ps.losses.SoftTarget(), ps.losses.ReverseKL(cross_entropy=1.0), ps.losses.LogitsMSE()])
def test_sound_task_gives_the_losses_and_no_warning(loss: Any) -> None:
    found = look(loss)
    assert found.warnings == ()
    assert found.notes[0].startswith("loss before the first step, on 15 rows: ")
    assert "the teacher's 0.0266" in found.notes[1] and found.notes[1].endswith("guessing 1.61")


def test_teacher_that_was_never_trained_is_warned_of() -> None:
    turned = knowing()
    with torch.no_grad():
        turned[0].weight.copy_(turned[0].weight.roll(1, 0))
    (warning,) = look(ps.losses.SoftTarget(), turned).warnings
    assert "no better than guessing among 5 classes (1.61): was it trained" in warning


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (lambda s, t, y: F.kl_div(s, t.softmax(-1), reduction="batchmean"), "0"),  # logits in place of log-probabilities
        (lambda s, t, y: F.kl_div(t.log_softmax(-1), s.softmax(-1), reduction="batchmean") - s.square().mean(), "-4"),
    ],
)
def test_divergence_of_the_teacher_from_itself_that_pulls_is_warned_of(loss: Any, value: str) -> None:
    (warning,) = look(lambda s, t, y: {"kl": loss(s, t, y), "ce": F.cross_entropy(s, y)}).warnings
    assert "the distillation term (kl) is not least where the student equals the teacher" in warning


def test_loss_that_does_not_read_the_teacher_is_warned_of() -> None:
    (warning,) = look(lambda s, t, y: F.cross_entropy(s, y)).warnings
    assert "does not depend on the teacher's output" in warning


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.own = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)

    def pipeline_blocks(self) -> list[ps.Block]:
        return [ps.Block("body", self.body, ("body",)), ps.Block("own", lambda h: {"taught": h, "logits": self.own(h)}, ("own",))]


def test_block_that_the_distillation_term_does_not_reach_is_warned_of() -> None:
    def loss(s: dict[str, Tensor], t: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"mse": F.mse_loss(s["taught"], t), "ce": F.cross_entropy(s["logits"], y)}

    (warning,) = look(loss, model=TwoHeads()).warnings
    assert warning == "no gradient of the distillation term (mse) reaches student block 1 ('own')"


def test_parameters_that_no_file_gave_are_warned_of() -> None:
    teacher = nn.Sequential(nn.Linear(CLASSES, CLASSES, bias=False), nn.Linear(CLASSES, CLASSES, bias=False))
    with torch.no_grad():
        teacher[0].weight.copy_(torch.eye(CLASSES) * 5)
        teacher[1].weight.copy_(torch.eye(CLASSES))
    teacher[0].weight._is_hf_initialized = True  # as from_pretrained marks what it has loaded
    (warning,) = look(ps.losses.SoftTarget(), teacher).warnings
    assert warning == "the teacher has parameters that no file gave, which are as they were drawn: 1.weight"


class Notices(Callback):
    def __init__(self) -> None:
        self.told: list[str] = []

    def notice(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize("strategy", ["reference", "fill"])
def test_fit_looks_first_changes_nothing_and_can_be_told_not_to(strategy: str) -> None:
    def trained(**options: Any) -> tuple[list[str], dict[str, Tensor]]:
        torch.manual_seed(1)
        task = ps.Distillation(
            nn.Sequential(*linears(4, CLASSES)), nn.Sequential(*linears(4, 8, CLASSES)), ps.losses.SoftTarget()
        )
        seen = Notices()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ps.Trainer(task, strategy=strategy, device="cpu", callbacks=[seen], **options).fit(vectors())
        return seen.told, dict(task.student.state_dict())

    (told, weights), (silent, same) = trained(), trained(first_look=False)
    assert len(told) == 2 and silent == []
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
