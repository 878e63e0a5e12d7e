import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipestill.errors import ConfigError
from pipestill.model.blocks import BlockModel
from pipestill.recipes.vit import VIT_B, VIT_L, VIT_S, VIT_S_MOCO, ViTShape, sines, vit

TINY = ViTShape(width=16, depth=2, heads=4, patch=2)


@pytest.mark.parametrize("classes", [None, 10])
@pytest.mark.parametrize("size", [8, 6])
def test_is_its_blocks_one_after_the_other(classes: int | None, size: int) -> None:
    model = vit(TINY, 3, 8, classes, seed=1)
    blocks = BlockModel(model)
    images = torch.randn(5, 3, size, size)
    assert [block.name for block in blocks.blocks] == ["embedding", "blocks.0", "blocks.1", "head"]
    assert torch.equal(model(images), blocks(images))
    assert model(images).shape == (5, classes or TINY.width)


def test_state_has_the_names_and_shapes_of_timm() -> None:
    state = {name: tuple(tensor.shape) for name, tensor in vit(TINY, 3, 8, 10).state_dict().items()}
    layer = {
        "norm1.weight": (16,), "norm1.bias": (16,), "attn.qkv.weight": (48, 16), "attn.qkv.bias": (48,),
        "attn.proj.weight": (16, 16), "attn.proj.bias": (16,), "norm2.weight": (16,), "norm2.bias": (16,),
        "mlp.fc1.weight": (64, 16), "mlp.fc1.bias": (64,), "mlp.fc2.weight": (16, 64), "mlp.fc2.bias": (16,),
    }  # fmt: skip
    assert state == {
        "cls_token": (1, 1, 16), "pos_embed": (1, 17, 16), "patch_embed.proj.weight": (16, 3, 2, 2),
        "patch_embed.proj.bias": (16,), "norm.weight": (16,), "norm.bias": (16,), "head.weight": (10, 16), "head.bias": (10,),
        **{f"blocks.{i}.{name}": form for i in range(2) for name, form in layer.items()},
    }  # fmt: skip


@pytest.mark.parametrize(("shape", "millions"), [(VIT_S, 22.05), (VIT_S_MOCO, 22.05), (VIT_B, 86.57), (VIT_L, 304.33)])
def test_published_sizes(shape: ViTShape, millions: float) -> None:
    """Parameters of timm's vit_*_patch16_224, as published."""
    with torch.device("meta"):
        count = sum(p.numel() for p in vit(shape, 3, 224, 1000).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_is_the_same_from_the_same_seed_alone() -> None:
    first, same, other = (vit(TINY, 1, 8, 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_attention_is_that_of_torch() -> None:
    model = vit(TINY, 1, 8, None)
    ours = model.blocks[0].attn
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    tokens = torch.randn(3, 17, 16)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens)[0])


def test_what_is_frozen() -> None:
    model = vit(TINY, 1, 8, None, positions="sincos", freeze_patches=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert all(p.requires_grad for p in vit(TINY, 1, 8, None).parameters())


def test_sines_tell_all_places_apart() -> None:
    places = sines(4, 16)[0]
    assert torch.equal(places[0], torch.zeros(16))
    assert torch.cdist(places[1:], places[1:]).add(10 * torch.eye(16)).min() > 0.5
    row, column = places[1 + 4 * 2 + 3].chunk(2)  # the third row, the fourth column
    assert torch.equal(row, places[1 + 4 * 2].chunk(2)[0])
    assert torch.equal(column, places[1 + 3].chunk(2)[1])


@pytest.mark.parametrize("size", [6, 12])
def test_positions_of_other_sizes_are_interpolated(size: int) -> None:
    model = vit(TINY, 1, 8, None)
    grid = size // 2
    own = model.pos_embed[:, 1:].detach().reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(own, (grid, grid), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        got = model._embed(torch.zeros(1, 1, size, size))
    torch.testing.assert_close(got[:, 1:], expected)
    model(torch.randn(2, 1, size, size)).pow(3).sum().backward()  # the plain sum of a layer norm never changes
    assert model.pos_embed.grad is not None
    assert model.pos_embed.grad.abs().min() > 0


def test_dropout_is_of_training_alone() -> None:
    model = vit(TINY, 1, 8, None, dropout=0.5)
    images = torch.randn(4, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"depth is 0; expected at least 1; mlp_ratio is 0"):
        ViTShape(16, 0, 4, 2, mlp_ratio=0)
    with pytest.raises(ConfigError, match="width 16 is no multiple of the 3 heads"):
        ViTShape(16, 1, 3, 2)
    with pytest.raises(ConfigError, match="images of 9 pixels do not divide into patches of 2"):
        vit(TINY, 1, 9, None)
    with pytest.raises(ConfigError, match="images of 7 pixels"):
        vit(TINY, 1, 8, None)(torch.zeros(1, 1, 7, 7))
    with pytest.raises(ConfigError, match="need a multiple of 4"):
        vit(ViTShape(6, 1, 2, 2), 1, 8, None, positions="sincos")
