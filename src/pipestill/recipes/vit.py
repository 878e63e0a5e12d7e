"""Vision Transformers of any sizes, cut at their layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill.arguments import raise_problems
from pipestill.errors import ConfigError
from pipestill.model.block import Block
from pipestill.model.seeding import seeded

Positions = Literal["learnt", "sincos"]


@dataclass(frozen=True)
class ViTShape:
    """Sizes of a Vision Transformer: `patch` in pixels, `mlp_ratio` hidden units of a layer for each of its width."""

    width: int
    depth: int
    heads: int
    patch: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; expected at least 1"
            for name in ("width", "depth", "heads", "patch")
            if getattr(self, name) < 1
        ]
        if not problems and self.width % self.heads:
            problems.append(f"width {self.width} is no multiple of the {self.heads} heads")
        if not self.mlp_ratio > 0:
            problems.append(f"mlp_ratio is {self.mlp_ratio}; expected more than 0")
        raise_problems(problems)


VIT_S, VIT_B, VIT_L = ViTShape(384, 12, 6, 16), ViTShape(768, 12, 12, 16), ViTShape(1024, 24, 16, 16)
"""ViT-S of DeiT, ViT-B and ViT-L (Dosovitskiy et al. 2021, table 1)."""

VIT_S_MOCO = ViTShape(384, 12, 12, 16)
"""ViT-S with twice the heads (Chen et al. 2021, MoCo v3, section 5.1)."""


def vit(
    shape: ViTShape,
    channels: int,
    size: int,
    classes: int | None,
    *,
    positions: Positions = "learnt",
    freeze_patches: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> VisionTransformer:
    """Build a Vision Transformer for images (rows, channels, size, size) -> logits (rows, classes), initialised from `seed`.

    Without `classes` it gives features (rows, width), those of the class token.

    `positions`: trained from random values, or fixed sines and cosines of row and column. `freeze_patches`: the
    projection of patches stays as it is initialised, without which MoCo v3 is unstable (section 4.2).
    """
    return seeded(seed, lambda: VisionTransformer(shape, channels, size, classes, positions, freeze_patches, dropout))


class VisionTransformer(nn.Module):
    """Patches and a class token through layers of attention (Dosovitskiy et al. 2021).

    Images of other sizes than that which it is built for are taken too: their positions are interpolated between its own. One
    block for the embedding, one a layer, and one for the norm and the head. The state has the names of timm's
    VisionTransformer, so weights of its models of the same sizes fit.
    """

    def __init__(
        self,
        shape: ViTShape,
        channels: int,
        size: int,
        classes: int | None,
        positions: Positions,
        freeze_patches: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.grid = _patches(size, shape.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, shape.width))
        self.patch_embed = PatchEmbedding(channels, shape.width, shape.patch)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Layer(shape, dropout) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.head = nn.Identity() if classes is None else nn.Linear(shape.width, classes)
        self._initialise(positions)
        if freeze_patches:
            self.patch_embed.requires_grad_(False)

    def pipeline_blocks(self) -> list[str | Block]:
        return [
            Block("embedding", self._embed, ("patch_embed", "cls_token", "pos_embed", "pos_drop")),
            *(f"blocks.{i}" for i in range(len(self.blocks))),
            Block("head", self._finish, ("norm", "head")),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(self.blocks(self._embed(x)))

    def _embed(self, x: Tensor) -> Tensor:
        """Turn images (rows, channels, size, size) into tokens (rows, 1 + patches, width), the class token first."""
        x = self.patch_embed(x)
        rows, _, height, width = x.shape
        tokens = torch.cat([self.cls_token.expand(rows, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return self.pos_drop(tokens + self._positions(height, width))  # type: ignore[no-any-return]

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        own = self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid))
        # As matrices: torch's own bicubic interpolation has no deterministic gradient on CUDA.
        down, right = (_bicubic(self.grid, to, own) for to in (height, width))
        between = torch.einsum("hi,wj,ijc->hwc", down, right, own).flatten(0, 1)
        return torch.cat([self.pos_embed[:, :1], between.unsqueeze(0)], 1)

    def _finish(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]

    def _initialise(self, positions: Positions) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                parts = module.weight.chunk(3) if module.out_features == 3 * module.in_features else (module.weight,)
                for part in parts:  # queries, keys and values are three matrices
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if positions == "learnt":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            self.pos_embed.data.copy_(sines(self.grid, self.pos_embed.shape[-1]))
            self.pos_embed.requires_grad_(False)


class PatchEmbedding(nn.Module):
    """A linear map of each patch: (rows, channels, size, size) -> (rows, width, size / patch, size / patch)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        for pixels in x.shape[2:]:
            _patches(pixels, self.patch)
        return self.proj(x)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut: (rows, tokens, width) -> the same."""

    def __init__(self, shape: ViTShape, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape.width, shape.heads, dropout)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = Mlp(shape.width, int(shape.width * shape.mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention of all tokens to all tokens, with several heads: (rows, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.drop(self.proj(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """One hidden layer with GELU: (..., width) -> the same."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))  # type: ignore[no-any-return]


def sines(grid: int, width: int) -> Tensor:
    """Position embeddings (1, 1 + grid^2, width): sines and cosines of row and column, zeros for the class token.

    They are those of Vaswani et al. 2017, section 3.5, in two dimensions.
    """
    if width % 4:
        raise ConfigError(f"width is {width}; positions as sines and cosines of row and column need a multiple of 4")
    waves = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * waves
    along = torch.cat([angles.sin(), angles.cos()], 1)  # (grid, width / 2)
    places = torch.cat([along[:, None].expand(-1, grid, -1), along[None].expand(grid, -1, -1)], 2)
    return torch.cat([torch.zeros(1, width), places.flatten(0, 1).float()]).unsqueeze(0)


def _bicubic(old: int, new: int, like: Tensor) -> Tensor:
    """The matrix (new, old) that interpolates `old` values at `new` places."""
    same = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(same[None, None], (new, old), mode="bicubic")[0, 0]


def _patches(size: int, patch: int) -> int:
    if size < patch or size % patch:
        raise ConfigError(f"images of {size} pixels do not divide into patches of {patch}; choose a multiple of it")
    return size // patch
