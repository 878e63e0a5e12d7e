"""What a receiver is known to have is no longer kept by the sender."""

from support import block_targets

import pipestill as ps


def test_sends_are_let_go_of_on_their_own_lane() -> None:
    """Of four sends, two relays; a token and the last relay may still be on their way."""
    assert ps.launch(block_targets.settled, (), 2, threads=1, timeout_seconds=30.0) == [4, 2, 2]
