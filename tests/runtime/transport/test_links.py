"""The link between ranks, as it is measured."""

import torch

from pipestill.runtime.transport.links import measure_link
from pipestill.runtime.world import OneProcess


def test_ranks_of_one_process_have_a_link_that_costs_nothing() -> None:
    link = measure_link(OneProcess(2), 0.0, torch.device("cpu"))
    assert link.seconds(10**9) == 0.0
