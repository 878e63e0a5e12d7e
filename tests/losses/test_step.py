"""The step that a loss is evaluated in."""

import pipestill as ps
from pipestill.losses.step import at_step


def test_the_step_is_that_around_a_loss_and_0_elsewhere() -> None:
    assert ps.step_number() == 0
    with at_step(3):
        assert ps.step_number() == 3
        with at_step(4):
            assert ps.step_number() == 4
        assert ps.step_number() == 3
    assert ps.step_number() == 0
