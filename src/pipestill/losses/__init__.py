"""Losses and metrics: functions of (student output, teacher output, target) and of (output, target).

A loss returns the mean over the rows that it is given, as a scalar or as a dict of scalars whose sum is the loss
and whose names are logged. Any callable of that form is one.
"""

from __future__ import annotations

from pipestill.losses.blockwise import SoftCrossEntropy, cosine_distance, mse, normalised_mse
from pipestill.losses.distillation import Cosine, LogitsMSE, SoftTarget
from pipestill.losses.masked_language import MaskedDistillation, masked_accuracy, masked_cross_entropy
from pipestill.losses.momentum import Dino, InfoNCE, byol
from pipestill.losses.signatures import BlockLoss, DistillationLoss, LossValue, Metric, MomentumLoss, SupervisedLoss
from pipestill.losses.supervised import accuracy, cross_entropy

__all__ = [
    "BlockLoss",
    "Cosine",
    "Dino",
    "DistillationLoss",
    "InfoNCE",
    "LogitsMSE",
    "LossValue",
    "MaskedDistillation",
    "Metric",
    "MomentumLoss",
    "SoftCrossEntropy",
    "SoftTarget",
    "SupervisedLoss",
    "accuracy",
    "byol",
    "cosine_distance",
    "cross_entropy",
    "masked_accuracy",
    "masked_cross_entropy",
    "mse",
    "normalised_mse",
]
