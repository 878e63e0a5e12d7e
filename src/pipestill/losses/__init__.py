"""Losses and metrics that ship; any callable of the same signature will do.

A loss takes outputs of the student and of the teacher, and the target. It returns the mean over the rows that it gets, as a
scalar or as a dict of scalars whose sum is the loss; their names are logged. A metric takes an output and the target.
"""

from pipestill.losses.blockwise import SoftCrossEntropy, cosine_distance, mse, normalised_mse
from pipestill.losses.distillation import Cosine, LogitsMSE, MaskedDistillation, SoftTarget, masked_cross_entropy
from pipestill.losses.momentum import Dino, InfoNCE, byol
from pipestill.losses.signatures import BlockLoss, DistillationLoss, LossValue, Metric, MomentumLoss, SupervisedLoss
from pipestill.losses.supervised import accuracy, cross_entropy, masked_accuracy

__all__ = [
    "BlockLoss", "Cosine", "Dino", "DistillationLoss", "InfoNCE", "LogitsMSE", "LossValue", "MaskedDistillation", "Metric",
    "MomentumLoss", "SoftCrossEntropy", "SoftTarget", "SupervisedLoss", "accuracy", "byol", "cosine_distance",
    "cross_entropy", "masked_accuracy", "masked_cross_entropy", "mse", "normalised_mse",
]  # fmt: skip
