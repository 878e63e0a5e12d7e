"""Llama-shaped models in parts: embeddings, the attention and the MLP of each layer, and the head, each of which can be replaced.

Between parts travels a dict of `hidden` (rows, length, features), `position_ids` (rows, length), which start at 0 with each
example of a row, and `real` (rows, length), which is False for padding.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError

Value = dict[str, Tensor]


class Embeddings(nn.Module):
    """The embeddings of tokens: from a batch's inputs to the value that travels."""

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, inputs: Value) -> Value:
        return {"hidden": self.tokens(inputs["input_ids"]), "position_ids": inputs["position_ids"], "real": inputs["real"]}


class AttentionPart(nn.Module):
    """The attention of a layer with the norm before it, added to what it takes."""

    def __init__(self, norm: nn.Module, attention: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.rotary = rotary

    def forward(self, value: Value) -> Value:
        hidden, positions = value["hidden"], value["position_ids"]
        embeddings = self.rotary(hidden, position_ids=positions)
        made = self.attention(self.norm(hidden), position_embeddings=embeddings, attention_mask=seen(positions))
        return {**value, "hidden": hidden + made[0]}


class MlpPart(nn.Module):
    """The MLP of a layer with the norm before it, added to what it takes."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp

    def forward(self, value: Value) -> Value:
        hidden = value["hidden"]
        return {**value, "hidden": hidden + self.mlp(self.norm(hidden))}


class Skip(nn.Module):
    """Nothing in the place of an attention or an MLP."""

    def forward(self, value: Value) -> Value:
        return dict(value)


class Layer(nn.Module):
    """A layer as one block: its attention, then its MLP."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp

    def forward(self, value: Value) -> Value:
        made: Value = self.mlp(self.attention(value))
        return made


class Head(nn.Module):
    """The final norm and the output layer: from the value that travels to `logits` (rows, length, vocabulary)."""

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear

    def forward(self, value: Value) -> Value:
        return {"logits": self.linear(self.norm(value["hidden"]))}


def seen(positions: Tensor) -> Tensor:
    """Which tokens (the last axis) each token attends to, (rows, 1, length, length): those before it in its example."""
    example = (positions == 0).cumsum(-1)
    return (example[:, :, None] == example[:, None, :]).tril()[:, None]


def real_hidden(value: Value) -> Tensor:
    """The hidden states of a value, 0 at padding."""
    return value["hidden"] * value["real"][..., None]


def in_parts(model: Any, whole_layers: bool) -> nn.Sequential:
    """Take a causal language model of `transformers` apart; its modules are those of the result.

    `whole_layers`: make one block of each layer, else one of its attention and one of its MLP.

    Raises:
        ModelError: it is not Llama-shaped: it has other parts, or does something else between them.
    """
    base: Any = getattr(model, "model", None)
    named = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    layers = list(getattr(base, "layers", ()))
    lacking = [name for name in ("embed_tokens", "norm", "rotary_emb") if not hasattr(base, name)]
    lacking += [f"layers[{i}].{name}" for i, layer in enumerate(layers) for name in named if not hasattr(layer, name)]
    if not layers or lacking or not hasattr(model, "lm_head"):
        raise ModelError(f"{type(model).__name__} is not Llama-shaped: it lacks {', '.join(lacking[:3]) or 'layers or lm_head'}")
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise ModelError(f"{type(model).__name__} has layers that attend to a window; expected full attention in all")
    parts: OrderedDict[str, nn.Module] = OrderedDict(embeddings=Embeddings(base.embed_tokens))
    for i, layer in enumerate(layers):
        attention = AttentionPart(layer.input_layernorm, layer.self_attn, copy.deepcopy(base.rotary_emb))
        mlp = MlpPart(layer.post_attention_layernorm, layer.mlp)
        if whole_layers:
            parts[f"layer_{i}"] = Layer(attention, mlp)
        else:
            parts[f"attention_{i}"], parts[f"mlp_{i}"] = attention, mlp
    parts["head"] = Head(base.norm, model.lm_head)
    made = nn.Sequential(parts)
    _check_equal(model, made)
    return made


@torch.no_grad()
def _check_equal(model: Any, parts: nn.Sequential) -> None:
    """Refuse parts that do not give what the model gives, for a row of two examples."""
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    device = next(model.parameters()).device
    ids = torch.arange(12, device=device)[None] * 7 % model.config.vocab_size
    training = model.training
    model.eval()
    wanted = model(input_ids=ids, position_ids=positions.to(device), use_cache=False).logits
    got = parts.eval()({"input_ids": ids, "position_ids": positions.to(device), "real": torch.ones_like(ids).bool()})["logits"]
    model.train(training)
    parts.train(training)
    error = float((got - wanted).abs().max())
    if not error <= 1e-4 * float(wanted.abs().max()):
        raise ModelError(
            f"{type(model).__name__} is not Llama-shaped: its parts give other logits than its forward (by {error:.2g}); choose "
            "a model of the kinds Llama, Mistral, Qwen2 or Qwen3"
        )


def trunk(parts: nn.Sequential) -> nn.Sequential:
    """All parts but the head, the same modules: what is trained block by block."""
    return nn.Sequential(OrderedDict(list(parts.named_children())[:-1]))


def replaced(parts: nn.Sequential, choose: Callable[[str, nn.Module], nn.Module]) -> nn.Sequential:
    """Make a model of what `choose` gives for each part's name and module."""
    return nn.Sequential(OrderedDict((name, choose(name, part)) for name, part in parts.named_children()))
