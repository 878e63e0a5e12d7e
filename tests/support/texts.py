"""Small texts, their tokens, and sequences of random tokens."""

import torch

from pipestill.recipes.sequences import Sequences
from pipestill.recipes.tokens import Tokens, trained_tokens

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "nine", "small", "bears", "sing"]


def paragraphs(count: int, start: int = 0) -> str:
    return "\n\n".join(" ".join(WORDS[(start + i + j) % len(WORDS)] for j in range(3 + i % 9)) for i in range(count))


def tokens() -> Tokens:
    return trained_tokens((paragraphs(40),), 150)


def data(count: int, generator: torch.Generator) -> Sequences:
    lengths = torch.randint(4, 30, (count,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Sequences(torch.randint(5, 100, (int(lengths.sum()),), generator=generator).int(), starts)
