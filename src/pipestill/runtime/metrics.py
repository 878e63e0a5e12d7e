"""Metrics of a validation: the mean of each over all rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipestill.errors import ConfigError
from pipestill.losses import Metric


class MetricMeans:
    """Adds up metrics, weighted by rows, and gives their means.

    `sums` holds one float64 for each metric and, last, the number of rows; it travels between ranks.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self.sums = torch.zeros(len(metrics) + 1, dtype=torch.float64)

    def add(self, output: Any, target: Any, rows: int) -> None:
        """Add every metric of the outputs and targets of `rows` rows; `ConfigError` where one is no scalar."""
        values = [self._scalar(name, metric(output, target)) for name, metric in self.metrics.items()]
        self.sums += torch.stack([*values, torch.ones((), dtype=torch.float64)]) * rows

    @staticmethod
    def _scalar(name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                raise ConfigError(f"metric '{name}' gave {value!r}; expected a scalar") from None
        if value.dim():
            raise ConfigError(f"metric '{name}' gave a tensor of shape {tuple(value.shape)}; expected a scalar")
        scalar: Tensor = value.detach().double().cpu()
        return scalar

    def means(self) -> dict[str, float]:
        """The mean of each metric over all rows that were added."""
        return dict(zip(self.metrics, (self.sums[:-1] / self.sums[-1]).tolist(), strict=True))
