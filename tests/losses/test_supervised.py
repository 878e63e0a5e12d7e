"""The loss of a classifier without a teacher."""

import torch
import torch.nn.functional as F
from support.outputs import STUDENT, TARGET

from pipestill.losses import cross_entropy


def test_cross_entropy_is_that_of_torch() -> None:
    assert torch.equal(cross_entropy(STUDENT, TARGET)["cross_entropy"], F.cross_entropy(STUDENT, TARGET))
