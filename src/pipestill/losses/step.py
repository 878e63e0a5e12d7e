"""The step that a loss is evaluated in: for temperatures, weights and the like that change while a student is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_STEP: ContextVar[int] = ContextVar("step")
_steps = [0]
"""The steps under way, the innermost last: for threads that have no context of ours, as autograd's own on other devices."""


def step_number() -> int:
    """The number of the step, counted from 0 over the whole run, whose loss is being evaluated.

    A loss calls this where it changes while the student is trained, as an annealed temperature does: the same step has the same
    loss under any strategy, and where a run goes on from a state. It is 0 while a sample batch is tried out or costs are
    measured, and outside of a run.
    """
    return _STEP.get(_steps[-1])


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """Have `step_number` give `step` in the body."""
    token = _STEP.set(step)
    _steps.append(step)
    try:
        yield
    finally:
        _steps.pop()
        _STEP.reset(token)


def in_step() -> bool:
    """Whether the loss is evaluated in a step of a run, and not on a sample batch that is only tried out or measured."""
    return _STEP.get(None) is not None
