"""Feature losses on every pair of stages, against the plain loop and against one graph without Pipestill."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.feature_cases import between, deep
from support.fits import Case, assert_same
from support.models import vectors
from support.pairwise import every_other
from torch import nn

import pipestill as ps
from pipestill.runtime.pipeline.features import cut_after

STAGES = list(product(range(3), range(3)))


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("teacher", "student"), every_other(STAGES))
def test_every_pair_of_three_stages_equals_the_plain_loop(teacher: int, student: int) -> None:
    """Where the last output is compared too, models differ in nothing but their width of 5."""
    case = Case(lambda: between(teacher, student), vectors, trainer={"optimizer": torch.optim.AdamW, "clip_grad_norm": 1.0})
    expected = case.run("reference")
    assert expected.steps[-1]["hint"] != expected.steps[0]["hint"]
    assert {"features.hint.projector.weight", "features.hint.projector.bias"} <= expected.state.keys()
    other = ("sequential", "gpipe", "1f1b", "split")[(3 * teacher + student) % 4]
    assert_same(case.run("fill", 3), expected)
    assert_same(case.run("fill", 3, split_backward=True) if other == "split" else case.run(other, 3), expected)


@pytest.mark.usefixtures("quick_plans")
def test_halves_of_microbatches_equal_the_plain_loop_over_halves() -> None:
    case = Case(lambda: between(2, 0), vectors, trainer={"optimizer": torch.optim.AdamW})
    assert_same(case.run("tspipe", 3), case.run("reference", microbatches=6))


def test_features_equal_one_graph_without_pipestill() -> None:
    """In float64, where the order of sums does not show."""
    torch.manual_seed(0)
    teacher, student = deep(4, 8, 8).double(), deep(4, 6, 6).double()
    data = [(x.double(), y) for x, y in vectors((9, 7))]
    term = ps.features({"1": "0", "0": "1"}, ps.losses.Hint(), project=True, weight=0.3)
    task = ps.Distillation(teacher, copy.deepcopy(student), _soft, features=term)
    trainer = ps.Trainer(task, optimizer=torch.optim.SGD, lr=0.5, strategy="reference", microbatches=3, device="cpu")
    trainer.preflight(data)  # makes the projectors
    first = {name: copy.deepcopy(module) for name, module, _ in task.beside}
    trainer.fit(data)

    heads = {"0": first["features.0.projector"], "1": first["features.1.projector"]}
    optimizer = torch.optim.SGD([*student.parameters(), *(p for head in heads.values() for p in head.parameters())], lr=0.5)
    for x, y in data:
        ours, theirs = {}, {}
        a, b = x, x
        for i in range(3):
            a, b = student[i](a), teacher[i](b).detach()
            ours[str(i)], theirs[str(i)] = a, b
        hints = [
            F.mse_loss(heads["0"](ours["0"]).float(), theirs["1"].float()),
            F.mse_loss(heads["1"](ours["1"]).float(), theirs["0"].float()),
        ]
        optimizer.zero_grad()
        (_soft(a, b, y) + 0.3 * sum(hints)).backward()
        optimizer.step()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(task.student.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)
    for name, head in heads.items():
        for key, tensor in head.state_dict().items():
            torch.testing.assert_close(dict(task.beside[int(name)].module.state_dict())[key], tensor, rtol=1e-6, atol=1e-8)


def _soft(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def test_blocks_are_cut_after_those_that_are_compared() -> None:
    assert cut_after(range(2, 7), [0, 3, 6]) == [range(2, 4), range(4, 7)]
    assert cut_after(range(1), []) == [range(1)]
    assert cut_after(range(3), range(3)) == [range(1), range(1, 2), range(2, 3)]


def test_a_projector_starts_from_the_seed_of_its_time() -> None:
    """As a module's own weights do, whatever is drawn until a batch tells the widths."""

    def made(noise: int) -> torch.Tensor:
        torch.manual_seed(3)
        task = between(0, 1)
        torch.rand(noise)
        ps.Trainer(task, strategy="reference", device="cpu").preflight(vectors())
        projector = task.beside[0].module
        assert isinstance(projector, nn.Module)
        return projector.state_dict()["weight"]

    assert torch.equal(made(1), made(5))


def test_a_run_goes_on_with_its_projectors() -> None:
    """Also in a process whose projectors no batch has told their widths yet."""
    data = vectors((9, 9, 9, 9))

    def trainer() -> ps.Trainer:
        torch.manual_seed(0)
        task = between(1, 0)
        return ps.Trainer(task, optimizer=torch.optim.AdamW, lr=0.1, strategy="reference", microbatches=3, device="cpu")

    whole, first, second = trainer(), trainer(), trainer()
    whole.fit(data, steps=4)
    first.fit(data[:2], steps=2)
    state = first.engine.state()
    assert {name for name in state.optimizer if name.startswith("features.")} == {
        "features.hint.projector.weight", "features.hint.projector.bias",
    }  # fmt: skip
    second.engine.load_state(state)
    result = second.fit(data[2:], steps=2)
    expected = dict(whole.task.beside[0].module.state_dict())
    assert list(result.beside) == ["features.hint.projector.weight", "features.hint.projector.bias"]
    for name, tensor in second.student.state_dict().items():
        assert torch.equal(tensor, whole.student.state_dict()[name]), name
    assert all(torch.equal(result.beside[f"features.hint.projector.{name}"], tensor) for name, tensor in expected.items())
