"""One step taken block by block."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import CASES, Call, linears, supervised
from support.models import CLASSES
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.dry_run import dry_run
from pipestill.model.stepwise import restored

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


def test_it_finds_who_writes_in_place() -> None:
    """Behind a block that only passes its input on, too."""
    assert dry_run(CASES["in_place_starts"].task(), X, Y).copies == {1, 2, 4, 5, 6, 8}
    assert dry_run(CASES["writes_to_the_batch"].task(), X, Y).copies == {0, 1}


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_batch_that_both_models_read_is_not_written_to(role: str, place: int) -> None:
    """Even where the one who writes might be on another rank, so that it would depend on the plan."""
    blocks: list[nn.Module] = [nn.Hardtanh(inplace=True), *linears(4, 8, CLASSES)]
    if place:
        blocks.insert(0, nn.Identity())
    models = {"teacher": nn.Sequential(*linears(4, 8, CLASSES)), "student": nn.Sequential(*linears(4, 8, CLASSES))}
    models[role] = nn.Sequential(*blocks)
    with pytest.raises(ModelError, match=f"the {role} changes its input in place, and the other model reads it too"):
        dry_run(ps.Distillation(loss=ps.losses.SoftTarget(), **models), X, Y)


def test_a_gradient_that_depends_on_the_rows_is_refused() -> None:
    def some(self: Any, v: Any) -> Tensor:
        return F.relu(v[0]) + (v[1] if len(v[0]) > 2 else 0.0)

    task = supervised(
        Call(lambda self, x: (self.a(x), x * self.b), a=nn.Linear(4, 4), b=nn.Parameter(torch.ones(4))),
        Call(some),
        nn.Linear(4, CLASSES),
    )
    with pytest.raises(ModelError, match=r"after student block 0 \('0'\): a tensor gets a gradient for 2 rows or for 3"):
        dry_run(task, X, Y)


def test_everything_is_put_back_after_an_error_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model(torch.randn(4, 2)).sum().backward()
    model[0].eval()
    mean, state = model[1].running_mean, torch.random.get_rng_state()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    with pytest.raises(KeyError), restored([model]):
        assert all(parameter.grad is None for parameter in model.parameters())
        model.train()
        model(torch.randn(4, 2)).sum().backward()
        model[1].running_mean = torch.ones(2)
        raise KeyError
    assert model[1].running_mean is mean
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model] == [False, True]
    assert torch.equal(torch.random.get_rng_state(), state)
