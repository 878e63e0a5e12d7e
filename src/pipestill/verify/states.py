"""Two states of the same models compared, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-9
"""Largest relative difference that can come from rounding sums of float64 in another order."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the entries of a tensor are from the expected ones.

    Args:
        absolute: the largest distance of two entries; NaN where one of them is
        relative: the same, divided by the largest magnitude of the expected entries
    """

    absolute: float
    relative: float


def differences(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, Difference]:
    """Compare every expected tensor bit by bit; returns those that differ, by name."""
    return {
        name: difference(tensor, got[name]) for name, tensor in expected.items() if not torch.equal(tensor, got[name])
    }


def difference(expected: Tensor, got: Tensor) -> Difference:
    """Measure how far two tensors of one shape are apart."""
    absolute = float((expected.double() - got.double()).abs().max())
    magnitude = float(expected.double().abs().max())
    return Difference(absolute, absolute / max(magnitude, torch.finfo(torch.float64).tiny))


def is_rounding(found: Difference, tolerance: float) -> bool:
    """Whether a difference is within the tolerance; NaN never is."""
    return found.relative <= tolerance
