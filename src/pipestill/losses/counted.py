"""Losses that say how much their targets count for, so that a batch has one loss, whatever microbatches it is taken in.

A mean over the rows of a batch is the mean, weighted by rows, of those over the rows of its microbatches. A mean over something
else (tokens with a label, classes with weights) is not: microbatches differ in how much of it they have. A loss with a method
`counts(target)` names the parts that are such means, and how much the target counts for in each. For these parts, sums are taken
instead of means: those of all microbatches, divided by the count of the whole batch, are the mean over the batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pipestill.errors import ModelError, UserError
from pipestill.losses.signatures import Counts, LossValue


class _Counted(nn.Module):
    """A function that gives sums, with a function that counts."""

    def __init__(self, function: Callable[..., LossValue], counts: Callable[[Any], Counts]) -> None:
        super().__init__()
        self.function = function  # registered where it is a module: its buffers are moved and kept with the loss
        self.counter = counts
        self.takes_linear_logits = bool(getattr(function, "takes_linear_logits", False))

    def counts(self, target: Any) -> Counts:
        """How much the target counts for."""
        return self.counter(target)

    def sums(self, *given: Any) -> LossValue:
        """Sums in place of means."""
        return self.function(*given)

    def forward(self, *given: Any) -> LossValue:
        """Means over what the target counts for."""
        return means(self.sums(*given), self.counts(given[-1]))


def counted(function: Callable[..., LossValue], counts: Callable[[Any], Counts]) -> nn.Module:
    """Make a loss (or a metric) whose mean over a batch is a sum divided by a count.

    Args:
        function: a loss with the arguments that its task's losses have, the target last, which gives sums over what counts. Of a
            dict, the parts that `counts` names are sums; all others are means over rows, as in any loss.
        counts: from a target to how much it counts for, a number of at least 0: of all rows together it is the sum of those of
            the rows. Where `function` gives a dict, this is a dict of numbers by part. It is called with a whole batch's targets,
            on the CPU, before the batch is trained on.

    Returns:
        the loss. Called by itself, it gives sums divided by counts: 0 where nothing counts.
    """
    return _Counted(function, counts)


def means(sums: LossValue, counts: Counts) -> LossValue:
    """Divide sums by their counts; a sum of what counts for nothing is 0. Parts without a count stay as they are."""
    found = dict(sums) if isinstance(sums, Mapping) else {"loss": sums}
    for name, value in counts.items() if isinstance(counts, Mapping) else [("loss", counts)]:
        if name not in found:
            raise ModelError(f"counts(target) names '{name}', and the loss has the parts {', '.join(found)}")
        found[name] = found[name] / count if (count := float(value)) else found[name] * 0.0
    return found if isinstance(sums, Mapping) else found["loss"]


def counts_of(loss: Any, target: Any, what: str = "the loss") -> dict[str, float]:
    """How much a target counts for, by part of a loss (or a metric, `what`); empty where all its parts are means over rows.

    Raises a `UserError` where the loss's `counts` fails, or gives anything but numbers of at least 0.
    """
    count = getattr(loss, "counts", None)
    if not callable(count):
        return {}
    try:
        found = count(target)
        numbers = {name: float(value) for name, value in (found.items() if isinstance(found, Mapping) else [("loss", found)])}
    except UserError:
        raise
    except Exception as error:
        raise ModelError(
            f"counts(target) of {what} failed: {type(error).__name__}: {error}; expected a number, or a dict of numbers by part "
            "of the loss, from a whole batch's targets on the CPU"
        ) from error
    wrong = [f"{value} for '{name}'" for name, value in numbers.items() if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise ModelError(f"counts(target) of {what} gave {', '.join(wrong)}; expected finite numbers, 0 or more")
    return numbers


def with_sums(loss: Any, *given: Any) -> LossValue:
    """Evaluate a loss with sums in place of means for the parts that it counts."""
    sums = getattr(loss, "sums", None)
    value: LossValue = sums(*given) if callable(sums) and callable(getattr(loss, "counts", None)) else loss(*given)
    return value
