"""What strategies are measured on."""

import torch

from pipestill.compare.bench import WholeBatches


def test_short_batches_are_left_out() -> None:
    loader = [(torch.ones(rows, 2), torch.zeros(rows)) for rows in (4, 4, 1)]
    batches = WholeBatches(loader)
    assert batches.rows == 4
    assert [len(inputs) for inputs, _ in batches] == [4, 4]
    assert [len(inputs) for inputs, _ in batches] == [4, 4]  # every pass anew


def test_inputs_alone_are_a_batch() -> None:
    assert [targets for _, targets in WholeBatches([torch.ones(3, 2)])] == [None]
