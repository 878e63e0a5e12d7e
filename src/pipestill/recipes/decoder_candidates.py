"""Smaller modules for the places of a layer's attention and MLP, each made of the weights of the one that it replaces."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ConfigError
from pipestill.recipes.decoder_parts import AttentionPart, Layer, MlpPart, Skip

KEEP = "keep"
SKIP = "skip"
LINEAR = "linear"
GROUPED = "grouped-"


class LinearAttention(nn.Module):
    """Attention whose weight of a key is the product of two feature vectors, so that its cost grows linearly with the length.

    A head's features are softmax([Wx, -Wx]) of its rotated query or key (Hedgehog, Zhang et al. 2024; LoLCATs, Zhang et al.
    2025), where W is trained and starts as one. All products of a row are computed at once, behind the mask; the recurrent form,
    for generation, is not here.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            copy.deepcopy(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.q_norm, self.k_norm = (copy.deepcopy(getattr(attention, name, nn.Identity())) for name in ("q_norm", "k_norm"))
        self.head_dim = attention.head_dim
        heads = self.q_proj.out_features // self.head_dim
        start = torch.eye(self.head_dim, dtype=self.q_proj.weight.dtype)
        self.query_map, self.key_map = (nn.Parameter(start.expand(heads, -1, -1).clone()) for _ in range(2))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = (_rotated(x, *position_embeddings) for x in (query, key))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        weights = (_features(query, self.query_map) @ _features(key, self.key_map).mT) * attention_mask
        made = (weights / weights.sum(-1, keepdim=True)) @ value
        return self.o_proj(made.transpose(1, 2).flatten(2)), None


def _features(x: Tensor, weight: Tensor) -> Tensor:
    """The features of queries or keys (rows, heads, length, head_dim): (rows, heads, length, 2 head_dim), above 0."""
    mapped = x @ weight.mT
    return torch.cat([mapped, -mapped], -1).softmax(-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, as Llama does."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


@torch.no_grad()
def grouped(attention: Any, kv_heads: int) -> nn.Module:
    """Make attention with fewer heads of keys and values, each the mean of several (Ainslie et al. 2023, section 2.1)."""
    config = copy.deepcopy(attention.config)
    have = attention.k_proj.out_features // attention.head_dim
    if not 0 < kv_heads < have or have % kv_heads:
        raise ConfigError(
            f"'{GROUPED}{kv_heads}' cannot replace an attention of {have} heads of keys; expected a divisor of {have}"
        )
    config.num_key_value_heads = kv_heads
    made: Any = type(attention)(config, attention.layer_idx)
    state = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    for name in state:
        if name.startswith(("k_proj.", "v_proj.")):
            heads = state[name].view(kv_heads, have // kv_heads, attention.head_dim, -1)
            state[name] = heads.mean(1).reshape(kv_heads * attention.head_dim, *state[name].shape[1:])
    made.load_state_dict(state)
    return made.to(attention.k_proj.weight.dtype)  # type: ignore[no-any-return]


@torch.no_grad()
def narrower(mlp: Any, divisor: int) -> nn.Module:
    """Make an MLP of the units whose weights are largest: one of `divisor` of them."""
    have = mlp.up_proj.out_features
    units = have // divisor
    if divisor < 2 or units < 1:
        raise ConfigError(f"'1/{divisor}' cannot replace an MLP of {have} units; expected 1/2 to 1/{have}")
    size = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    kept = size.topk(units).indices.sort().values
    made = copy.deepcopy(mlp)
    made.intermediate_size = units
    for name in ("gate_proj", "up_proj"):
        setattr(made, name, _linear(getattr(mlp, name), kept, slice(None)))
    made.down_proj = _linear(mlp.down_proj, slice(None), kept)
    return made  # type: ignore[no-any-return]


def _linear(source: Any, rows: Any, columns: Any) -> nn.Linear:
    """Make a linear layer of some rows and columns of another."""
    weight = source.weight[rows][:, columns].clone()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=source.bias is not None, dtype=weight.dtype)
    made.weight.copy_(weight)
    if source.bias is not None:
        made.bias.copy_(source.bias[rows])
    return made


def attention_problem(name: str) -> str | None:
    """Why `name` is no replacement of an attention; None where it is one."""
    number = name.removeprefix(GROUPED)
    if name in (LINEAR, SKIP) or (name != number and number.isdigit() and int(number) > 0):
        return None
    return f"no attention '{name}'; expected {LINEAR}, {GROUPED}N (N heads of keys and values) or {SKIP}"


def mlp_problem(name: str) -> str | None:
    """Why `name` is no replacement of an MLP; None where it is one."""
    number = name.removeprefix("1/")
    if name == SKIP or (name != number and number.isdigit() and int(number) > 1):
        return None
    return f"no MLP '{name}'; expected 1/N (one of N units), or {SKIP}"


def candidate(name: str, part: nn.Module) -> nn.Module:
    """Make the candidate of a name for the place of a part; of a whole layer, the name is ATTENTION+MLP.

    Halves that are kept are copies whose weights stay.
    """
    if isinstance(part, Layer):
        attention, _, mlp = name.partition("+")
        return Layer(candidate(attention, part.attention), candidate(mlp, part.mlp))
    if name == KEEP:
        return frozen(part)
    if name == SKIP:
        return Skip()
    made = copy.deepcopy(part)
    if isinstance(made, AttentionPart):
        number = name.removeprefix(GROUPED)
        made.attention = LinearAttention(made.attention) if name == LINEAR else grouped(made.attention, int(number))
    elif isinstance(made, MlpPart):
        made.mlp = narrower(made.mlp, int(name.removeprefix("1/")))
    return made.requires_grad_(True)


def frozen(part: nn.Module) -> nn.Module:
    """A copy of a part whose weights stay."""
    return copy.deepcopy(part).requires_grad_(False)
