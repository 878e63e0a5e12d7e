"""An example is one sequence of tokens to learn from, with a mark at each token that counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position whose next token does not count, as in PyTorch and `transformers`."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence of tokens that attend to each other, without padding."""

    input_ids: Tensor
    """The tokens, (length,), int64."""
    counted: Tensor
    """Whether each token is to be predicted, (length,), bool. The first never is: nothing comes before it."""
    place: str
    """Where the example is from, for messages."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further targets, by name: one value a token, (length, ...). Collators pad them with zeros."""

    @property
    def labels(self) -> Tensor:
        """The token after each position where that counts, else -100; the last is -100. (length,), int64."""
        labels = torch.full_like(self.input_ids, IGNORED)
        labels[:-1] = torch.where(self.counted[1:], self.input_ids[1:], IGNORED)
        return labels

    @property
    def num_counted(self) -> int:
        """How many labels count."""
        return int(self.counted[1:].sum())

    def __len__(self) -> int:
        return len(self.input_ids)
