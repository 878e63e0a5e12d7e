"""Batches of a masked language model: sequences in which some tokens are hidden, to be found."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipestill.losses.targets import IGNORED
from pipestill.model.seeding import derive, seeded
from pipestill.recipes.sequences import Sequences
from pipestill.recipes.tokens import Tokens

Batch = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Masking:
    """Turns sequences into inputs and targets of a masked language model, drawn anew each time.

    Inputs: `input_ids` and `attention_mask` (rows, length). Targets: see `losses.MaskedDistillation`. Of the tokens but [CLS]
    and [SEP], a share of `probability` is to be found; of these 80 % read [MASK], 10 % are another token and 10 % are left
    (Devlin et al. 2019, section 3.1). Sequences are padded to `length`, or to the longest, rounded up to a multiple of 8.
    """

    tokens: Tokens
    max_length: int
    probability: float = 0.15
    vary: bool = True

    def __call__(self, samples: Sequence[Tensor]) -> Batch:
        longest = max(len(sample) for sample in samples) if self.vary else self.max_length
        length = min(-(-longest // 8) * 8, self.max_length)
        ids = torch.full((len(samples), length), self.tokens.pad, dtype=torch.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = sample
        lengths = torch.tensor([len(sample) for sample in samples])
        real = torch.arange(length) < lengths[:, None]
        inner = real & (ids != self.tokens.cls) & (ids != self.tokens.sep)
        chosen = (torch.rand(ids.shape) < self.probability) & inner
        draw, other = torch.rand(ids.shape), torch.randint(self.tokens.size, ids.shape)
        shown = torch.where(chosen & (draw < 0.8), self.tokens.mask, ids)
        shown = torch.where(chosen & (draw >= 0.9), other, shown)
        inputs = {"input_ids": shown, "attention_mask": real.long()}
        return inputs, {"labels": torch.where(chosen, ids, IGNORED), "tokens": real.float()}


def fixed(data: Sequences, masking: Masking, batch_size: int, seed: int) -> list[Batch]:
    """Make batches of all of `data` for tests, from the longest sequence to the shortest, masked once, by `seed`."""
    order = data.lengths().argsort(descending=True, stable=True)
    parts = order.split(batch_size)
    return seeded(derive(seed, "test masks"), lambda: [masking([data[int(i)] for i in part]) for part in parts])
