"""Messages between processes: over gloo, and through shared memory."""

import pytest
from support import block_targets, targets

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
        (targets.never_posted, "rank 0 waits for S0F2@7 from rank 1 .*, but never announced the receive"),
    ],
)
def test_every_wait_has_a_deadline_and_a_name(target: object, message: str, over: targets.Over) -> None:
    with pytest.raises(RankFailure, match=message):
        ps.launch(target, (over,), 2, threads=1, timeout_seconds=30.0)  # type: ignore[arg-type]


def test_sends_are_let_go_of_on_their_own_lane() -> None:
    """Of four sends, two relays; a token and the last relay may still be on their way."""
    assert ps.launch(block_targets.settled, (), 2, threads=1, timeout_seconds=30.0) == [4, 2, 2]
