"""What the pieces of a step take, as costs."""

from contextlib import nullcontext

import torch
from torch import nn

from pipestill.losses import cross_entropy
from pipestill.model.blocks import BlockModel
from pipestill.model.dry_run import dry_run
from pipestill.model.measure import Stopwatch
from pipestill.model.profile import profile
from pipestill.model.step_costs import microbatch_of, weight_fractions
from pipestill.model.tasks import Supervised


def test_what_blocks_keep_for_their_backward_is_counted_once() -> None:
    """Linear layers keep their input, a ReLU its output; the last layer's input is that output."""
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    task = Supervised(layers, cross_entropy)
    few = (torch.rand(3, 8), torch.tensor([0, 1, 2]))
    costs = profile(
        task, dry_run(task, *few), *few, rows=5, optimizer=lambda p: torch.optim.SGD(p.values(), 0.1), repeats=1
    )
    assert [b.stash_bytes for b in costs.student] == [4 * 5 * 8, 4 * 5 * 16, 0]
    assert [b.training_bytes for b in costs.student] == [b.parameter_bytes for b in costs.student], "gradients"


def test_a_microbatch_begins_again_where_the_sample_is_short() -> None:
    inputs, targets = microbatch_of({"x": torch.arange(3)}, (torch.arange(3) * 10,), 5)
    assert inputs["x"].tolist() == [0, 1, 2, 0, 1]
    assert targets[0].tolist() == [0, 10, 20, 0, 10]


def halves() -> nullcontext[Stopwatch]:
    """A clock by which the first half of a backward takes one second, and the second three."""
    return nullcontext(Stopwatch(iter([0.0, 1.0, 1.0, 4.0, 4.0]).__next__))


def test_fractions_of_backwards_that_weights_take() -> None:
    """All of the first block's; of a block that writes to its input too; none of one that stays whole or cannot be halved."""
    two_weights = nn.Linear(4, 4)
    model = BlockModel(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 4), Twice(two_weights))
    )
    outputs = [torch.randn(2, 4).requires_grad_() * 1 for _ in range(5)]
    found = weight_fractions(model, outputs, halves, repeats=2, whole={3})
    assert found == [1.0, 0.75, 0.75, 0.0, 0.0]


class Twice(nn.Module):
    """A layer that is used twice, whose weights' gradients cannot be taken apart."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x))
