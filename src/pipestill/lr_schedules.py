"""Learning-rate schedules: each function here returns a function from the step to a factor on the learning rate.

    trainer = ps.Trainer(..., lr=0.1, lr_schedule=ps.lr_schedules.cosine(total_steps=10_000, warm_up_steps=500))

A step is one update of the student; the first is step 0. The returned functions hold no state and can be pickled, so every rank
may have a copy. They also fit `weight_decay_schedule`, where the factor is on the weight decay.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

from pipestill.arguments import raise_problems, real_number, whole

LrSchedule = Callable[[int], float]
"""A function from the step (from 0) to a factor on the learning rate."""


def cosine(total_steps: int, *, warm_up_steps: int = 0, start: float = 1.0, end: float = 0.0) -> LrSchedule:
    """Move from `start` to `end` along half a cosine (Loshchilov and Hutter 2017, section 3), behind an optional warm-up.

    Args:
        total_steps: steps of the whole training, warm-up included; from this step on the factor is `end`
        warm_up_steps: steps in which the factor first rises evenly to `start` (default: none)
        start: factor at the first step after the warm-up
        end: factor from `total_steps` on

    Returns:
        a function from the step (from 0) to the factor

    Raises:
        ConfigError: for a number of steps that cannot be
    """
    _check(total_steps, warm_up_steps, start=start, end=end)
    return _behind(warm_up_steps, start, partial(_cosine, total_steps - warm_up_steps, start, end))


def linear(total_steps: int, *, warm_up_steps: int = 0, end: float = 0.0) -> LrSchedule:
    """Fall evenly from 1 to `end`, behind an optional warm-up.

    Args:
        total_steps: steps of the whole training, warm-up included; from this step on the factor is `end`
        warm_up_steps: steps in which the factor first rises evenly to 1 (default: none)
        end: factor from `total_steps` on

    Returns:
        a function from the step (from 0) to the factor

    Raises:
        ConfigError: for a number of steps that cannot be
    """
    _check(total_steps, warm_up_steps, end=end)
    return _behind(warm_up_steps, 1.0, partial(_linear, total_steps - warm_up_steps, end))


def steps(milestones: Sequence[int], *, factor: float = 0.1) -> LrSchedule:
    """Start at 1, and multiply by `factor` at each milestone (as in He et al. 2016, section 3.4).

    Args:
        milestones: the steps from which on another `factor` counts, in any order
        factor: what the learning rate is multiplied by at each milestone

    Returns:
        a function from the step (from 0) to the factor

    Raises:
        ConfigError: for a milestone that is no step
    """
    problems = (whole("a milestone", milestone, 0) for milestone in milestones)
    raise_problems(chain(*problems, real_number("factor", factor, least=0)))
    return partial(_steps, tuple(milestones), factor)


def warm_up(warm_up_steps: int, then: LrSchedule | None = None) -> LrSchedule:
    """Rise evenly to 1, then follow another schedule, which counts its steps from the end of the warm-up.

    Args:
        warm_up_steps: steps of the rise; at step 0 the factor is 1 / warm_up_steps
        then: a function from the step to a factor (default: it stays at 1)

    Returns:
        a function from the step (from 0) to the factor

    Raises:
        ConfigError: for a number of steps that cannot be
    """
    raise_problems(whole("warm_up_steps", warm_up_steps, 0))
    return _behind(warm_up_steps, 1.0, _constant if then is None else then)


def _check(total_steps: int, warm_up_steps: int, **factors: float) -> None:
    raise_problems(
        chain(
            whole("total_steps", total_steps, 1),
            whole("warm_up_steps", warm_up_steps, 0),
            *(real_number(name, factor, least=0) for name, factor in factors.items()),
        )
    )


def _behind(warm_up_steps: int, top: float, then: LrSchedule) -> LrSchedule:
    return partial(_warm_up, warm_up_steps, top, then) if warm_up_steps else then


def _warm_up(warm_up_steps: int, top: float, then: LrSchedule, step: int) -> float:
    return top * ((step + 1) / warm_up_steps) if step < warm_up_steps else then(step - warm_up_steps)


def _constant(step: int) -> float:
    return 1.0


def _cosine(total_steps: int, start: float, end: float, step: int) -> float:
    left = 0.5 * (1.0 + math.cos(math.pi * step / total_steps)) if step < total_steps else 0.0
    return end + (start - end) * left


def _linear(total_steps: int, end: float, step: int) -> float:
    left = (total_steps - step) / total_steps if step < total_steps else 0.0
    return end + (1.0 - end) * left


def _steps(milestones: Sequence[int], factor: float, step: int) -> float:
    return float(factor ** sum(step >= milestone for milestone in milestones))
