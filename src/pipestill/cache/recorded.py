"""Writing a cache while a student is trained, and in a pass over the data that trains nothing."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pipestill.arguments import a_loss, one_of, raise_problems
from pipestill.cache.keys import SAMPLE, complete_samples, keys_of
from pipestill.cache.writer import Writer
from pipestill.errors import ModelError
from pipestill.losses.step import in_step
from pipestill.model.nests import to_device


class Recorded(nn.Module):
    """A loss of `ps.Distillation` that writes what the teacher says into a cache, on the rank that evaluates the loss.

    The value is that of the loss by itself. Sample batches that a trainer tries out before the first step are not written.
    """

    def __init__(self, loss: Callable[..., Any], writer: Writer) -> None:
        """Wrap a loss.

        Args:
            loss: the loss; it gets the targets without the keys of samples.
            writer: the writer of the cache. It is used in a `with` block around `fit`, on every rank.
        """
        super().__init__()
        raise_problems((*a_loss("loss", loss), *one_of("writer", writer, Writer, "a ps.cache.Writer")), ModelError)
        self.loss = loss  # registered where it is a module: what it holds is moved and kept
        self.writer = writer

    def counts(self, target: Any) -> Any:
        """How much the targets count for, as the loss says; nothing where it does not count.

        Args:
            target: the targets, with keys of samples.
        """
        count = getattr(self.loss, "counts", None)
        return count(_without_keys(target)) if callable(count) else {}

    def sums(self, student: Any, teacher: Any, target: Any) -> Any:
        """Compute sums in place of means for the parts that the loss counts.

        Args:
            student: the student's output.
            teacher: the teacher's output.
            target: the targets, with keys of samples.
        """
        self._write(teacher, target)
        sums = getattr(self.loss, "sums", self.loss)
        return sums(student, teacher, _without_keys(target))

    def forward(self, student: Any, teacher: Any, target: Any) -> Any:
        """Compute the loss.

        Args:
            student: the student's output.
            teacher: the teacher's output.
            target: the targets, with keys of samples.
        """
        self._write(teacher, target)
        return self.loss(student, teacher, _without_keys(target))

    def _write(self, teacher: Any, target: Any) -> None:
        keys_of(target)  # missing ones are told in the dry run already
        if in_step():
            self.writer.add(teacher, target)


def _without_keys(target: Any) -> Any:
    return {name: value for name, value in target.items() if name != SAMPLE} if isinstance(target, Mapping) else target


@torch.no_grad()
def fill(
    writer: Writer,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    device: str = "cpu",
    done: Callable[[int, int], None] | None = None,
) -> int:
    """Run a teacher over all batches of a loader, and write what it says into a cache.

    Batches of which the cache has every sample are passed over, so that a pass goes on where an earlier one ended.

    Args:
        writer: the writer of the cache; what is left is on disk afterwards.
        teacher: the teacher, in eval mode afterwards. It gets a batch's inputs, a dict as keyword arguments where it takes them.
        loader: yields batches (inputs, targets), whose data set was given keys (`ps.cache.keyed`).
        device: where the teacher runs: "cpu" or "cuda".
        done: called after each batch, with the number of its samples and of their tokens.

    Returns:
        how many samples were written.
    """
    place, before = torch.device(device), writer.num_written
    teacher.to(place).eval()
    for inputs, targets in loader:
        samples = complete_samples(keys_of(targets))
        if not all(key in writer for key, *_ in samples):
            given = to_device(inputs, place)
            writer.add(_called(teacher, given), targets)
        if done is not None:
            done(len(samples), sum(length for *_, length in samples))
    writer.flush()
    return writer.num_written - before


def _called(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a dict as keyword arguments where its forward has these, else with the inputs as they are."""
    if isinstance(inputs, Mapping):
        try:
            inspect.signature(model.forward).bind(**inputs)
        except TypeError:
            return model(inputs)
        return model(**inputs)
    return model(inputs)
