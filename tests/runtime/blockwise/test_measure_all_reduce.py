"""All-reduces are measured for every block and size of group, and nothing in the models changes."""

import pytest
from support import block_targets

import pipestill as ps
from pipestill.runtime.blockwise.measure_all_reduce import group_sizes


@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 3, 4]), (8, [2, 3, 4, 6, 8]), (64, [2, 3, 4, 6, 9, 13, 19, 28, 42, 63, 64])],
)
def test_sizes_of_groups(num_ranks: int, sizes: list[int]) -> None:
    assert group_sizes(num_ranks) == sizes


def test_every_block_and_size_is_measured_and_nothing_changes() -> None:
    """On three ranks there is one group of two, and a rank that waits."""
    profile, dropped, same = ps.launch(block_targets.allreduces, (), 3, threads=1, timeout_seconds=60.0)
    assert [block.allreduce_ranks for block in profile.blocks] == [(2, 3)] * 4
    assert [len(block.allreduce_seconds) for block in profile.blocks] == [2] * 4
    assert all(dropped) and same
