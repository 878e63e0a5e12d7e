"""What a target says of each token: its label, whether that counts, and how much the token counts in a divergence."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipestill.errors import DataError

IGNORED = -100
"""The label of what does not count, where a loss has no other."""


class Target(NamedTuple):
    """The labels and weights of some tokens; each is None where the target gives none."""

    labels: Tensor | None
    """Class indices, (rows, ...)."""
    counted: Tensor | None
    """Whether each label counts."""
    weights: Tensor | None
    """How much each token counts in a divergence, (rows, ...), float64: `tokens`, else 1 where its label counts, 0 elsewhere."""


def read_target(target: Any, ignore_index: int) -> Target:
    """Read class indices, or a mapping with `labels` and perhaps `tokens`; anything else says nothing of tokens.

    `DataError` for labels or weights of the wrong type or shape.
    """
    labels = target.get("labels") if isinstance(target, Mapping) else target
    tokens = target.get("tokens") if isinstance(target, Mapping) else None
    if not isinstance(labels, Tensor) or (labels is target and not _whole(labels)):
        labels = None
    if labels is not None and not _whole(labels):
        raise DataError(f"labels are {labels.dtype}; expected class indices, whole numbers of (rows, ...)")
    counted = None if labels is None else labels != ignore_index
    if tokens is None:
        return Target(labels, counted, None if counted is None else counted.double())
    if not isinstance(tokens, Tensor) or (labels is not None and tokens.shape != labels.shape):
        came = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        shape = "a tensor" if labels is None else tuple(labels.shape)
        raise DataError(f"the target's tokens are {came}; expected a weight for each label, {shape}")
    if tokens.device.type == "cpu" and not (tokens >= 0).all():  # elsewhere the reader has looked at them before
        raise DataError("the target's tokens hold a negative number or NaN; expected weights of 0 or more")
    return Target(labels, counted, tokens.double())


def _whole(labels: Tensor) -> bool:
    return not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool


class Labels(NamedTuple):
    """The labels of some tokens, (rows, ...)."""

    labels: Tensor
    counted: Tensor
    """Whether each label counts."""


def labels_of(target: Any, ignore_index: int) -> Labels:
    """The labels in a target; `DataError` where there are none."""
    read = read_target(target, ignore_index)
    if read.labels is None or read.counted is None:
        came = f"a mapping of {', '.join(map(str, target))}" if isinstance(target, Mapping) else type(target).__name__
        came = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else came
        raise DataError(f"the target is {came}; expected labels: class indices, (rows, ...), or a mapping with them as 'labels'")
    return Labels(read.labels, read.counted)


def checked_labels(found: Labels, lead: torch.Size, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The label of each token of `lead` axes, 0 where it does not count, and whether it does (float64), both (tokens,).

    `DataError` where tokens have no label of their own, or one that is no class of the `vocabulary`.
    """
    if found.labels.shape != lead:
        raise DataError(
            f"labels are {tuple(found.labels.shape)}, but the logits are {(*lead, vocabulary)}; expected a label for each "
            "token (the first axes), or cross_entropy=0"
        )
    labels = torch.where(found.counted, found.labels, 0).reshape(-1)
    if labels.numel() and not labels.is_meta and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise DataError(
            f"labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to {vocabulary - 1}, or "
            f"{ignore_index} where none counts (ignore_index)"
        )
    return labels, found.counted.reshape(-1).double()


def spread(values: Tensor, lead: torch.Size, what: str) -> Tensor:
    """Give each token its row's value, divided by the row's tokens, where `values` has fewer axes than the logits' `lead`.

    Without this an output of (rows, length, features) could not be compared where a row has one label.
    """
    if values.shape == lead:
        return values.reshape(-1)
    if values.shape != lead[: values.dim()]:
        raise DataError(f"{what} are {tuple(values.shape)}, but the logits are of {tuple(lead)} tokens; give one for each token")
    rest = lead[values.dim() :]
    return (values / rest.numel()).reshape(*values.shape, *(1 for _ in rest)).expand(lead).reshape(-1)
