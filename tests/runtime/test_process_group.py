"""Messages between processes over gloo."""

import pytest
from support import targets

import pipestill as ps
from pipestill.errors import RankFailure


def test_every_type_in_any_order() -> None:
    assert ps.launch(targets.exchange, (), 2, threads=1, timeout_seconds=30.0) == "done"


def test_two_ranks_that_both_send_first() -> None:
    assert ps.launch(targets.both_send_first, (), 2, threads=1, timeout_seconds=30.0) == "done"


def test_many_microbatches_do_not_wait_for_targets_of_a_later_step() -> None:
    """Training hung with a hundred microbatches: the sender waited for the oldest send, the receiver for newer ones."""
    assert ps.launch(targets.announced_after_the_schedule, (), 2, threads=1, timeout_seconds=30.0) == "done"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (targets.never_sent, r"rank 0 waits for S1B2@7 from rank 1 on the gradient lane \(deadline 0.5 s\): "),
        (targets.never_taken, r"rank 0 waits until rank 1 takes S0F2@7 from rank 0 .* \(deadline 0.5 s\): "),
        (targets.never_posted, "rank 0 waits for S0F2@7 from rank 1 .*, but never announced that it would"),
    ],
)
def test_every_wait_has_a_deadline_and_a_name(target: object, message: str) -> None:
    with pytest.raises(RankFailure, match=message):
        ps.launch(target, (), 2, threads=1, timeout_seconds=30.0)  # type: ignore[arg-type]
