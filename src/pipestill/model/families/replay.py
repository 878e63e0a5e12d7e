"""Cuts any Hugging Face model into blocks, by replaying its own forward with other stages' layers as stand-ins.

A model is cut into its embeddings, each layer, and its head; an encoder-decoder also between its two lists of layers. A stage
calls the model's whole forward once: layers before its own give placeholders, its first layer gets what travelled, and the call
ends where the next stage's first layer would be called. So masks, rotary embeddings, softcaps and whatever else a forward does
between its layers are done by the model's own code, and no family needs code here.

Between blocks travels a dict of `hidden` (the hidden states), `more` (those others of the next layer's arguments that the forward
cannot make again from the inputs, since they depend on weights) and `inputs`. The last block returns a dict with the names of the
model's own output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipestill.model.block import Block
from pipestill.model.families.replay_check import check_config
from pipestill.model.families.replay_learn import learn
from pipestill.model.families.replay_model import ReplayedModel, pretrained_inside
from pipestill.model.families.replay_run import Arrived, Facts, Stop
from pipestill.model.families.replay_trace import uses_of


def replay_blocks(model: nn.Module) -> list[str | Block] | None:
    """The blocks of a model of `transformers`, or of one that peft has wrapped; None for any other model."""
    return None if pretrained_inside(model) is None else [*Replay(model).blocks()]


def cut_by_replay(model: nn.Module, sample: Any) -> list[Block]:
    """Cut a Hugging Face model whose inputs cannot be guessed from its config.

    Args:
        model: a model of `transformers`, or of another library whose forward takes its inputs as keywords.
        sample: a batch's inputs: a dict of the forward's keyword arguments, whose tensors' first axis counts rows.

    Returns:
        the blocks, to be given as `cuts`, `student_cuts` or `teacher_cuts`.

    Raises:
        ModelError: the model has no list of layers that is called in order, or its blocks do not give what it gives.
    """
    return Replay(model, sample).blocks()


@dataclass(eq=False)
class ReplayedBlock:
    """The call of one block. Consecutive blocks of one model are run by one replay (see `JointCall`)."""

    replay: "Replay"
    number: int

    def __call__(self, value: Any) -> Any:
        """Run the block."""
        return self.run_with((), value, lambda i: None)

    def run_with(self, following: Sequence[Any], value: Any, before: Callable[[int], None]) -> Any:
        """Run this block and those that follow it in one replay."""
        blocks = range(self.number, self.number + 1 + len(following))
        return self.replay.run(blocks, value, lambda block: before(block - self.number))

    def joins(self, other: Any) -> bool:
        """Whether another call is that of the block behind this one."""
        return isinstance(other, ReplayedBlock) and other.replay is self.replay and other.number == self.number + 1


class Replay:
    """A model that is run by replays of its forward, verified for all inputs that it has seen the names of.

    `sample`: inputs to look at (default: made from the model's config).
    """

    def __init__(self, model: nn.Module, sample: Any = None) -> None:
        check_config(model)
        self._model = model
        self._sample = sample
        self._look()

    def _look(self) -> None:
        """Look at the model as its weights are now, and verify its blocks."""
        self._dtype = self._weights_dtype
        self._replayed = ReplayedModel(self._model, self._sample)
        self._facts: dict[tuple[str, ...], Facts] = {}
        self._facts_of(self._replayed.sample)

    @property
    def _weights_dtype(self) -> torch.dtype:
        """The type of the model's weights, which placeholders have too."""
        return next(self._model.parameters()).dtype

    def blocks(self) -> list[Block]:
        """List the blocks."""
        layout = self._replayed.layout
        uses = uses_of(self._replayed.model, layout, self._replayed.parameter_owners)
        return [Block(name, ReplayedBlock(self, i), uses[i]) for i, name in enumerate(layout.block_names)]

    def _facts_of(self, inputs: dict[str, Any]) -> Facts:
        """What holds for inputs of these names; found out, and the blocks verified, when such inputs come first."""
        key = tuple(inputs)
        if key not in self._facts:
            self._facts[key] = learn(self._replayed, inputs)
        return self._facts[key]

    def run(self, blocks: range, value: Any, before: Callable[[int], None]) -> Any:
        """The value after consecutive blocks; `before(block)` is called just before each."""
        if self._weights_dtype is not self._dtype:  # model.to(dtype) after the model was cut
            self._look()
        replayed = self._replayed
        inputs = value["inputs"] if blocks.start else replayed.inputs_of(value)
        facts = self._facts_of(inputs)
        arrived = replayed.arrived(value, facts.crossings[blocks.start - 1]) if blocks.start else Arrived((), None)
        result = replayed.replay(blocks, inputs, arrived, before, facts)
        return replayed.travelling(blocks.stop, inputs, result, facts) if isinstance(result, Stop) else facts.outputs_of(result)
