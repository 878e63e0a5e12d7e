"""From examples to batches for causal language models: padded, or packed into rows that several examples share.

A batch is ({"input_ids", "attention_mask", "position_ids"}, {"labels", ...}), all (rows, length); what a model does not need of
the inputs is left out. The causal shift is done here: the label of position i is token i + 1, or -100 where that does not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from pipestill.arguments import hinted, one_of, raise_problems, shown, whole
from pipestill.data.example import IGNORED, Example
from pipestill.errors import ConfigError, DataError

Batch = tuple[dict[str, Tensor], dict[str, Tensor]]


@hinted
@dataclass(frozen=True)
class PadCollator:
    """Makes a batch with one example a row, padded to the longest of the batch; for `DataLoader(collate_fn=...)`.

    Args:
        pad: the token that fills rows up. No model sees it where it heeds the attention mask, so any token will do.
        side: "right" or "left", where padding goes. On the left, the batch has `position_ids` too, which start at 0 with each
            example: models with learnt positions would count the padding.
        multiple_of: lengths are rounded up to a multiple of this.
        length: pad all batches to this many tokens. Default: to the longest example.

    Raises:
        ConfigError: an argument is wrong.
    """

    pad: int
    _: KW_ONLY
    side: Literal["right", "left"] = "right"
    multiple_of: int = 1
    length: int | None = None

    def __post_init__(self) -> None:
        problems = [*whole("pad", self.pad, 0), *whole("multiple_of", self.multiple_of, 1)]
        problems += [] if self.length is None else whole("length", self.length, 1)
        if self.side not in ("right", "left"):
            problems.append(f"side is {shown(self.side)}; expected right or left")
        raise_problems(problems, ConfigError)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Make a batch.

        Args:
            examples: one a row.

        Raises:
            DataError: one is longer than `length`, or is no example.
        """
        if wrong := [example for example in examples if not isinstance(example, Example)]:
            raise DataError(
                f"the rows to pad are {shown(wrong[0])}; expected examples, one a row, as ps.data.tokenize makes them "
                "(rows of several are for ps.data.PackCollator)"
            )
        longest = max(map(len, examples))
        length = self.length or -(-longest // self.multiple_of) * self.multiple_of
        _check_room([(example.place, len(example)) for example in examples], length)
        left = self.side == "left"
        mask = stacked([torch.ones_like(example.input_ids) for example in examples], length, 0, left)
        inputs = {
            "input_ids": stacked([example.input_ids for example in examples], length, self.pad, left), "attention_mask": mask,
        }  # fmt: skip
        if left:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return inputs, _targets([[example] for example in examples], length, left)


@hinted
@dataclass(frozen=True)
class PackCollator:
    """Makes a batch of rows that several examples share, of which none attends to another; for `DataLoader(collate_fn=...)`.

    Position ids start at 0 with each example, and padding at the end of a row is one more example, without labels. The label of
    an example's last token is -100, so that no example predicts the next one.

    Args:
        length: the tokens of a row.
        pad: the token that fills rows up; any will do.
        attention: how a model is told which tokens belong together. "positions": by position ids that start anew and by no mask,
            which the models of `transformers` make block-diagonal masks of, and flash attention reads as they are. "mask": by an
            `attention_mask` of (rows, 1, length, length) that is added to the attention's scores, 0 within an example and the
            least number elsewhere, for models that do not heed position ids.
        mask_dtype: the type of that mask: the type that the model computes in.

    Raises:
        ConfigError: an argument is wrong.
    """

    length: int
    pad: int
    _: KW_ONLY
    attention: Literal["positions", "mask"] = "positions"
    mask_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        problems = [*whole("length", self.length, 1), *whole("pad", self.pad, 0)]
        problems += one_of("mask_dtype", self.mask_dtype, torch.dtype, "a torch.dtype")
        if self.attention not in ("positions", "mask"):
            problems.append(f"attention is {shown(self.attention)}; expected positions or mask")
        raise_problems(problems, ConfigError)

    def __call__(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Make a batch.

        Args:
            rows: for each row, its examples, as `Packed` and `Stream(pack_length=...)` give them.

        Raises:
            DataError: a row has more tokens than `length`.
        """
        if any(isinstance(row, Example) for row in rows):
            raise DataError("the rows to pack are single examples; pack them first: ps.data.Packed(examples, length)")
        _check_room([(row[0].place, sum(map(len, row))) for row in rows], self.length)
        ids = stacked([torch.cat([example.input_ids for example in row]) for row in rows], self.length, self.pad)
        sizes = [[len(example) for example in row] for row in rows]
        sizes = [[*row, self.length - sum(row)] for row in sizes]
        positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
        inputs = {"input_ids": ids, "position_ids": positions}
        if self.attention == "mask":
            inputs["attention_mask"] = self._mask(positions)
        return inputs, _targets(rows, self.length)

    def _mask(self, positions: Tensor) -> Tensor:
        """Make the mask (rows, 1, length, length) by which each token attends to those before it in its example."""
        number = (positions == 0).cumsum(-1)
        seen = (number[:, :, None] == number[:, None, :]).tril()
        mask = torch.zeros(seen.shape, dtype=self.mask_dtype)
        return mask.masked_fill(~seen, torch.finfo(self.mask_dtype).min)[:, None]


def stacked(rows: Sequence[Tensor], length: int, fill: float, left: bool = False) -> Tensor:
    """Put rows of several lengths, (tokens, ...), into one tensor (rows, length, ...), with `fill` after them, or before them."""
    first = rows[0]
    result = first.new_full((len(rows), length, *first.shape[1:]), fill)
    for place, row in zip(result, rows, strict=True):
        place[length - len(row) if left else 0 :][: len(row)] = row
    return result


def _targets(rows: Sequence[Sequence[Example]], length: int, left: bool = False) -> dict[str, Tensor]:
    """The labels and the extras of the examples of each row."""
    targets = {"labels": stacked([torch.cat([example.labels for example in row]) for row in rows], length, IGNORED, left)}
    extras: Mapping[str, Tensor] = rows[0][0].extras
    if any(example.extras.keys() != extras.keys() for row in rows for example in row):
        raise DataError("the examples of a batch differ in their extra targets; attach the same ones to all")
    for name in extras:
        targets[name] = stacked([torch.cat([example.extras[name] for example in row]) for row in rows], length, 0, left)
    return targets


def _check_room(rows: Sequence[tuple[str, int]], length: int) -> None:
    """Refuse rows that have more tokens than there is room for."""
    if long := [(place, tokens) for place, tokens in rows if tokens > length]:
        place, tokens = long[0]
        raise DataError(f"{place} has {tokens} tokens, and a row has {length}; tokenize with max_length={length}")
