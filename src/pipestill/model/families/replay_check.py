"""Verifies that a model's blocks, one after the other, give what its own forward gives, and refuses what they could not do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.families.replay_layers import Layout
from pipestill.model.remembered import modes_and_buffers
from pipestill.model.without_numbers import WithoutNumbers

_REFUSED = {
    "output_router_logits": "a loss of routers is over all layers, which lie in several stages",
    "output_hidden_states": "the states of all layers lie in several stages",
    "output_attentions": "the attentions of all layers lie in several stages",
}


def check_config(model: nn.Module) -> None:
    """Refuse what a config asks for and blocks cannot do, all at once."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    problems = []
    for config in configs.values():
        problems += [
            f"config.{name} is set, but {why}; set it to False" for name, why in _REFUSED.items() if getattr(config, name, 0)
        ]
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if getattr(config, name, 0):
                problems.append(f"config.{name} skips layers at random, which blocks cannot; build the model with {name}=0")
        if getattr(config, "apply_spec_augment", False) and (
            getattr(config, "mask_time_prob", 0) or getattr(config, "mask_feature_prob", 0)
        ):
            problems.append(
                "config.apply_spec_augment masks with numpy's random numbers, which no schedule draws alike; set it to False"
            )
    if problems:
        raise ModelError(f"{type(model).__name__}: {'; '.join(dict.fromkeys(problems))}")


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode and without graphs, and leave modes, buffers and random numbers as they were.

    A model without content, whose costs are computed, may ask its tensors for numbers (is a mask full?).
    """
    without = any(parameter.is_meta for parameter in model.parameters())
    with (
        modes_and_buffers([model]), torch.random.fork_rng(), torch.no_grad(), WithoutNumbers() if without else nullcontext(),
    ):  # fmt: skip
        torch.manual_seed(0)
        model.eval()
        yield


def verify(
    model: nn.Module, layout: Layout, samples: Mapping[str, Any], whole: Callable[[Any], Any],
    through: Callable[[int, Any], Any], places: Sequence[int],
) -> None:  # fmt: skip
    """Refuse blocks that do not give what the model gives, with the first one that differs.

    `whole` calls the model, and `through` one block. Samples take turns, so that nothing that a block leaves behind in the model
    fits the next one. `places`: where the hidden states are in what crosses after each block. In float32 on a CPU the two must
    be equal to the bit.
    """
    expected = {}
    with _crossings_seen(model, layout, places) as seen:
        for what, sample in samples.items():
            expected[what] = (whole(sample), dict(seen))
    values, first = dict(samples), dict.fromkeys(samples, "")
    for block, name in enumerate(layout.block_names):
        for what in samples:
            values[what] = through(block, values[what])
            if block < len(places) and not first[what] and not _alike(values[what]["hidden"], expected[what][1].get(block)):
                first[what] = name
    for what, value in values.items():
        if not _alike_nests(value, expected[what][0]):
            raise ModelError(
                f"the blocks of {type(model).__name__}, one after the other, do not give what its forward gives ({what}): block "
                f"'{first[what] or layout.block_names[-1]}' is the first that differs; pass cuts of your own"
            )


@contextmanager
def _crossings_seen(model: nn.Module, layout: Layout, places: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Give a dict that each call of the model fills with the hidden states after every block but the last."""
    seen: dict[int, Any] = {}
    hooks = []

    def see(block: int, nest: Any) -> None:
        leaf = pytree.tree_leaves(nest)[places[block]]
        seen[block] = leaf.clone() if isinstance(leaf, Tensor) else leaf

    for number, block in enumerate(layout.block_of_layer):
        layer = model.get_submodule(layout.layers[number])

        def before(module: nn.Module, args: Any, kwargs: Any, block: int = block - 1) -> None:
            see(block, (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any, block: int = block) -> None:
            see(block, output)

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        if number in layout.last_of_list:
            hooks.append(layer.register_forward_hook(after))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _alike_nests(one: Any, other: Any) -> bool:
    """Whether two nests have the same structure and equal tensors."""
    (ours, spec), (theirs, their_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == their_spec and all(_alike(a, b) for a, b in zip(ours, theirs, strict=True))


def _alike(one: Any, other: Any) -> bool:
    """Whether two leaves are equal: to the bit in float32 on a CPU, else up to rounding."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta:
        return True
    exact = (one.device.type == "cpu" and one.dtype in (torch.float32, torch.float64)) or not one.is_floating_point()
    return bool(torch.allclose(one, other, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-3, equal_nan=True))
