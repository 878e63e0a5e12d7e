"""What `restored` puts back."""

import pytest
import torch
from torch import nn

from pipestill.model.restore import restored


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
