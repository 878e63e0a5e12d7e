"""The step that a loss is evaluated in."""

from threading import Thread

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


def test_threads_of_autograd_know_the_step() -> None:
    """A loss that recomputes what it needs does so in the backward, which has threads of its own on CUDA."""
    seen: list[int] = []
    with at_step(3):
        thread = Thread(target=lambda: seen.append(ps.step_number()))
        thread.start()
        thread.join()
    assert seen == [3]
