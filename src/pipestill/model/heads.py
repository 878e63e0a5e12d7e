"""Linear heads that are taken out of a model's last block, so that the loss can apply them to a chunk of tokens at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.losses import LinearLogits, logits_of
from pipestill.model.blocks import BlockModel

HEAD_INPUT = "head_input"
"""What a last block without its head gives in place of `logits`, where it gives a dict."""


class FusedHead:
    """The linear head of one model, and the model's last block without it.

    The last block still owns the head: it stays in its stage, moves between devices with it and is trained by its optimizer.
    In train mode the student's last block gives what the head would get, and the loss applies the head. In eval mode it
    gives logits as ever, for metrics. A teacher's last block never applies its head.

    Args:
        role: "student" or "teacher".
        blocks: the model's blocks; the call of the last one is replaced.

    Raises:
        ModelError: the last block has no linear head that can be taken out.
    """

    def __init__(self, role: str, blocks: BlockModel) -> None:
        self.role = role
        self.blocks = blocks
        self.whole = blocks.blocks[-1]
        """The last block as it was, with the head."""
        self.name, self.layer = _linear_head(role, blocks)
        self.scale, self.softcap = _after_head(blocks.model)
        self.applied = False
        """Whether the last block applies the head after all (see `heads_applied`)."""
        self._copies: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        """A frozen head on other devices than its own: the teacher's last stage may be on another one than the loss."""
        blocks.blocks = (*blocks.blocks[:-1], replace(self.whole, call=self._call))

    def _call(self, value: Any) -> Any:
        """Call the last block, without its head where the loss applies it."""
        student_is_evaluated = self.role == "student" and not self.blocks.model.training
        return self.whole.call(value) if self.applied or student_is_evaluated else self.without(value)

    def without(self, value: Any) -> Any:
        """Call the last block, and give what its head gets in place of the logits."""
        taken: list[Tensor] = []

        def take(hidden: Tensor) -> Tensor:
            taken.append(hidden)
            return hidden.new_zeros((*hidden.shape[:-1], 1))

        self.layer.forward = take  # type: ignore[method-assign, assignment]
        try:
            output = self.whole.call(value)
        finally:
            del self.layer.forward
        if len(taken) != 1:
            raise ModelError(
                f"the {self.role}'s last block ('{self.whole.name}') applies its head '{self.name}' {len(taken)} times; "
                "fuse_heads needs one that applies it once"
            )
        if isinstance(output, Tensor):
            return taken[0]
        return {**{name: part for name, part in output.items() if name != "logits"}, HEAD_INPUT: taken[0]}

    def with_logits(self, output: Any) -> Any:
        """Give a loss an output of `without` with logits that it computes itself.

        Args:
            output: what the last block gave without its head.
        """
        hidden = output if isinstance(output, Tensor) else output[HEAD_INPUT]
        weight, bias = self._tensors(hidden.device)
        logits = LinearLogits(hidden, weight, bias, self.scale, self.softcap)
        if isinstance(output, Tensor):
            return logits
        return {**{name: part for name, part in output.items() if name != HEAD_INPUT}, "logits": logits}

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.layer.weight, self.layer.bias
        if self.role == "student" or weight.device == device:
            return weight, bias
        if device not in self._copies:
            self._copies[device] = weight.detach().to(device), None if bias is None else bias.detach().to(device)
        return self._copies[device]

    def check(self, inputs: Any) -> None:
        """Refuse a head after which the model does something else with the logits; call it in eval mode.

        Args:
            inputs: what the first block takes.
        """
        value = inputs
        for block in self.blocks.blocks[:-1]:
            value = block.call(value)
        logits = logits_of(self.whole.call(value))
        lazy = logits_of(self.with_logits(self.without(value)))
        assert isinstance(logits, Tensor) and isinstance(lazy, LinearLogits)
        computed = nn.functional.linear(lazy.hidden, lazy.weight, lazy.bias) * lazy.scale
        if lazy.softcap is not None:
            computed = lazy.softcap * torch.tanh(computed / lazy.softcap)
        if computed.shape != logits.shape or not torch.allclose(computed.double(), logits.double(), rtol=1e-3, atol=1e-5):
            raise ModelError(
                f"the {self.role}'s logits are not what its head '{self.name}' alone gives: its last block ('{self.whole.name}') "
                "changes them afterwards, which the loss could not do; leave fuse_heads out"
            )


@contextmanager
def heads_applied(heads: Sequence[FusedHead]) -> Iterator[None]:
    """Have last blocks give logits in the body, as they would without fused heads."""
    for head in heads:
        head.applied = True
    try:
        yield
    finally:
        for head in heads:
            head.applied = False


def check_takes_linear_logits(loss: object) -> None:
    """Raise `ModelError` for a loss that could not apply heads itself."""
    if not getattr(loss, "takes_linear_logits", False):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ModelError(
            f"fuse_heads needs a loss that applies heads itself, such as ps.losses.SoftTarget, and '{name}' does not; use such a "
            "loss, or give yours takes_linear_logits = True if it takes ps.losses.LinearLogits"
        )


def _linear_head(role: str, blocks: BlockModel) -> tuple[str, nn.Linear]:
    """The name and the layer of a model's head: its output embeddings, else the only linear layer of its last block."""
    model, last = blocks.model, range(len(blocks) - 1, len(blocks))
    names = {id(module): name for name, module in model.named_modules()}
    declared: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = declared() if callable(declared) else None
    inside = blocks.modules_of(last)
    found = [module for module in inside if isinstance(module, nn.Linear)] if head is None else [head]
    if len(found) != 1 or type(found[0]).forward is not nn.Linear.forward or not any(found[0] is module for module in inside):
        what = ", ".join(f"'{names.get(id(module), '?')}' ({type(module).__name__})" for module in found) or "none"
        raise ModelError(
            f"fuse_heads needs one nn.Linear that makes the {role}'s logits in its last block ('{blocks.blocks[-1].name}'); "
            f"there is {what}; cut the model so that its head is its last block, or leave fuse_heads out"
        )
    layer = found[0]
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise ModelError(f"the {role}'s head '{names[id(layer)]}' has hooks, which a loss would not call; leave fuse_heads out")
    return names[id(layer)], layer


def _after_head(model: nn.Module) -> tuple[float, float | None]:
    """The scale and the softcap that a model of `transformers` applies to its head's product, as its config says."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divided = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return float(scale) / float(divided), None if softcap is None else float(softcap)
