"""Shared memory between processes of one machine. What it has in common with gloo is in test_process_group.py."""

import pytest
from support import targets

import pipestill as ps
from pipestill.errors import RankFailure


def test_message_of_another_size_is_refused() -> None:
    with pytest.raises(RankFailure, match="S0F2@7 from rank 0 on the activation lane has 3600 bytes, where 2400 were announced"):
        ps.launch(targets.other_sizes, (), 2, threads=1, timeout_seconds=30.0)


def test_rank_that_waits_for_one_that_has_ended_says_so() -> None:
    with pytest.raises(RankFailure, match=r"rank 0 waits for S0F1@0 from rank 1 .*: rank 1 has ended"):
        ps.launch(targets.waits_for_who_has_ended, (), 2, threads=1, timeout_seconds=30.0)


def test_memory_is_used_again() -> None:
    made = ps.launch(targets.reuses_memory, (), 2, threads=1, timeout_seconds=30.0)
    assert len(made) == 2
    assert max(made) <= 2


def test_rank_that_meets_others_has_taken_nothing_but_hangs_nobody() -> None:
    """A sender waited until its messages were taken, though its receiver had announced them and waited for it elsewhere."""
    assert ps.launch(targets.meets_with_much_under_way, (), 2, threads=1, timeout_seconds=30.0) == 0.0


def test_ranks_that_share_no_memory_use_gloo_in_the_same_run() -> None:
    """One rank that did not want shared memory left the others waiting for it."""
    assert ps.launch(targets.one_of_three_without_memory, (), 3, threads=1, timeout_seconds=30.0) == [
        ([1], "shared memory and gloo"), ([0], "shared memory and gloo"), ([], "gloo"),
    ]  # fmt: skip
