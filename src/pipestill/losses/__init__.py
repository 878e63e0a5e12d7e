"""Losses and metrics that ship; any callable of the same signature will do.

A loss takes outputs of the student and of the teacher, and the target. It returns the mean over the rows that it gets, as a
scalar or as a dict of scalars whose sum is the loss; their names are logged. A metric takes an output and the target.
"""

from pipestill.losses.blockwise import SoftCrossEntropy, cosine_distance, mse, normalised_mse
from pipestill.losses.cached import CachedTopK
from pipestill.losses.counted import counted
from pipestill.losses.distillation import Cosine, MaskedDistillation
from pipestill.losses.features import RKD, AttentionMaps, AttentionTransfer, Hint
from pipestill.losses.logit_losses import JSD, ForwardKL, LogitLoss, LogitsMSE, ReverseKL, SoftTarget, TopKKL, TotalVariation
from pipestill.losses.logits import LinearLogits, logits_of
from pipestill.losses.metrics import Accuracy, Agreement, Perplexity, accuracy, agreement, perplexity
from pipestill.losses.momentum import Dino, InfoNCE, byol
from pipestill.losses.signatures import BlockLoss, DistillationLoss, LossValue, Metric, MomentumLoss, SupervisedLoss
from pipestill.losses.supervised import CrossEntropy, cross_entropy
from pipestill.losses.tokenizers import check_same_tokenizer

__all__ = [
    "JSD",
    "RKD",
    "Accuracy",
    "Agreement",
    "AttentionMaps",
    "AttentionTransfer",
    "BlockLoss",
    "CachedTopK",
    "Cosine",
    "CrossEntropy",
    "Dino",
    "DistillationLoss",
    "ForwardKL",
    "Hint",
    "InfoNCE",
    "LinearLogits",
    "LogitLoss",
    "LogitsMSE",
    "LossValue",
    "MaskedDistillation",
    "Metric",
    "MomentumLoss",
    "Perplexity",
    "ReverseKL",
    "SoftCrossEntropy",
    "SoftTarget",
    "SupervisedLoss",
    "TopKKL",
    "TotalVariation",
    "accuracy",
    "agreement",
    "byol",
    "check_same_tokenizer",
    "cosine_distance",
    "counted",
    "cross_entropy",
    "logits_of",
    "mse",
    "normalised_mse",
    "perplexity",
]  # fmt: skip
