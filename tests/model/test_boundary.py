"""Where the graph of a model is divided."""

import torch

from pipestill.model.boundary import detached, start_graph


def test_a_new_graph_gives_gradients_as_they_come() -> None:
    """Leaves of autograd would store the first one contiguously: a sum over it would differ in its last bits."""
    x = torch.randn(5, 32, requires_grad=True)
    start = x * 1.0
    value, tracked, gradients = detached({"turned": start, "again": start, "unused": x * 2, "plain": torch.ones(3)})
    assert value["turned"] is value["again"]
    assert value["plain"].requires_grad is False
    (value["turned"].t().contiguous() * 2).sum().backward()
    assert [g if g is None else g.stride() for g in gradients] == [(1, 5), None]
    assert tracked[0] is start
    assert x.grad is None


def test_tensors_of_a_new_graph_may_be_written_to() -> None:
    tensors, gradients = start_graph([torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 1.0])])
    flat = torch.nn.Flatten(0)(tensors[0])
    (flat.relu_() * tensors[1].mul_(3.0)).sum().backward()
    assert torch.equal(torch.stack([g for g in gradients if g is not None]), torch.tensor([[0.0, 3.0], [0.0, 6.0]]))


def test_a_value_without_a_graph_stays_as_it_is() -> None:
    value = {"x": torch.ones(2), "y": [1]}
    fresh, tracked, gradients = detached(value)
    assert fresh["x"] is value["x"]
    assert tracked == gradients == []
