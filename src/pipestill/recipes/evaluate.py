"""Metrics of a whole model on data with labels."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pipestill.losses import Metric
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import num_rows, to_device
from pipestill.runtime.reports import MetricMeans


def evaluate(
    model: nn.Module,
    metrics: Mapping[str, Metric],
    loader: Iterable[Any],
    device: torch.device,
    call: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """Compute the means of metrics over all rows of a loader; the model is left on the CPU, in eval mode.

    Args:
        model: what is evaluated
        metrics: functions of (output, target), by name
        loader: batches of (inputs, targets)
        device: where the model is run
        call: runs the model on inputs (default: the model itself)
    """
    means = MetricMeans(metrics)
    model.to(device).eval()
    with torch.no_grad():
        for batch in loader:
            inputs, targets = to_device(tuple(batch), device)
            means.add((call or model)(inputs), targets, num_rows(inputs, "a batch to test with"))
    model.to("cpu")
    return means.means()


def evaluate_pair(
    student: nn.Module, teacher: nn.Module, metrics: Mapping[str, Metric], loader: Iterable[Any], device: torch.device
) -> dict[str, float]:
    """Compute the means of metrics of two models; both are left on the CPU, in eval mode.

    Args:
        student: one model; it may be the other
        teacher: the other model
        metrics: functions of ((student output, teacher output), target), by name
        loader: batches of (inputs, targets)
        device: where the models are run
    """
    call = BlockModel(teacher)
    theirs = call if student is teacher else BlockModel(student)
    teacher.to(device).eval()
    found = evaluate(student, metrics, loader, device, lambda inputs: (theirs(inputs), call(inputs)))
    teacher.to("cpu")
    return found
