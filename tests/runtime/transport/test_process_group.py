"""Messages between processes: over gloo, and through shared memory."""

import pytest
from support import targets

import pipestill as ps
from pipestill.errors import RankFailure

OVER = pytest.mark.parametrize("over", [targets.gloo, targets.memory])


@OVER
def test_every_type_in_any_order(over: targets.Over) -> None:
    assert ps.launch(targets.exchange, (over,), 2, threads=1, timeout_seconds=30.0) == "done"


@OVER
def test_two_ranks_that_both_send_first(over: targets.Over) -> None:
    assert ps.launch(targets.both_send_first, (over,), 2, threads=1, timeout_seconds=30.0) == "done"


@OVER
def test_many_microbatches_do_not_wait_for_targets_of_a_later_step(over: targets.Over) -> None:
    """Training hung with a hundred microbatches: the sender waited for the oldest send, the receiver for newer ones."""
    assert ps.launch(targets.announced_after_the_schedule, (over,), 2, threads=1, timeout_seconds=30.0) == "done"


@OVER
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (targets.never_sent, r"rank 0 waits for S1B2@7 from rank 1 on the gradient lane \(deadline 0.5 s\): "),
        (targets.never_taken, r"rank 0 waits until rank 1 takes S0F2@7 from rank 0 .* \(deadline 0.5 s\): "),
        (targets.never_posted, "rank 0 waits for S0F2@7 from rank 1 .*, but never announced that it would"),
    ],
)
def test_every_wait_has_a_deadline_and_a_name(target: object, message: str, over: targets.Over) -> None:
    with pytest.raises(RankFailure, match=message):
        ps.launch(target, (over,), 2, threads=1, timeout_seconds=30.0)  # type: ignore[arg-type]


def test_message_of_another_size_is_refused() -> None:
    with pytest.raises(
        RankFailure, match="S0F2@7 from rank 0 on the activation lane has 3600 bytes, where 2400 were announced"
    ):
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
