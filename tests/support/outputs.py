"""Outputs and targets that tests of losses share, and a softmax worked out by hand."""

import math

import torch
from torch import Tensor

STUDENT = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
TEACHER = torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 2.0]])
TARGET = torch.tensor([1, 2])


def softmax(row: Tensor, temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in row.tolist()]
    return [p / sum(powers) for p in powers]
