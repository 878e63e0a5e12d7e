"""Policies for batch norm on microbatches, the same in a pipeline and in the plain loop.

- `microbatch`: every microbatch is normalised by its own statistics and updates the running statistics, as torch does.
- `deferred`: every microbatch is normalised by its own statistics, but the running statistics are updated once a batch, by
  those of the whole batch (torchgpipe, Kim et al. 2020, section 4). So evaluation does not depend on the microbatches.
- `frozen`: microbatches are normalised by the running statistics, which are not updated.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipestill.errors import ConfigError, ModelError, nearest
from pipestill.model.blocks import BlockModel

POLICIES = ("microbatch", "deferred", "frozen")


@dataclass(frozen=True)
class _Sums:
    """Count, sum and sum of squares of a layer's inputs since the last update of its running statistics."""

    count: int
    """The number of values of each channel."""
    total: Tensor
    """(channels,), as are the squares."""
    squares: Tensor


class Norms:
    """Keeps the statistics of batch-norm layers that defer the update of their running statistics to the end of a batch."""

    def __init__(self) -> None:
        self.sums: dict[_BatchNorm, _Sums | None] = {}
        """Each such layer, with the sums of its inputs; None before the first input of a batch."""

    def end_batch(self, modules: Iterable[nn.Module]) -> None:
        """Update the running statistics of those of `modules` that defer it, at the end of a batch."""
        for module in modules:
            if isinstance(module, _BatchNorm) and (sums := self.sums.get(module)) is not None:
                self._update(module, sums)
                self.sums[module] = None

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add a layer's input to its sums; called before each of its forwards."""
        assert isinstance(module, _BatchNorm)
        if not module.training:
            return
        given = args[0].detach().double()
        axes = [axis for axis in range(given.dim()) if axis != 1]
        count, total, squares = given.numel() // given.shape[1], given.sum(axes), given.square().sum(axes)
        old = self.sums[module]
        if old is not None:
            count, total, squares = old.count + count, old.total + total, old.squares + squares
        self.sums[module] = _Sums(count, total, squares)

    @staticmethod
    @torch.no_grad()
    def _update(module: _BatchNorm, sums: _Sums) -> None:
        """Update a layer's running statistics as torch would have done, had it seen the whole batch at once."""
        assert module.num_batches_tracked is not None
        assert module.running_mean is not None and module.running_var is not None
        module.num_batches_tracked.add_(1)
        factor = 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        mean = sums.total / sums.count
        variance = (sums.squares / sums.count - mean.square()).clamp(min=0) * (sums.count / max(1, sums.count - 1))
        module.running_mean.lerp_(mean.to(module.running_mean.dtype), factor)
        module.running_var.lerp_(variance.to(module.running_var.dtype), factor)


@contextmanager
def batch_norms(policy: str, models: Iterable[BlockModel]) -> Iterator[Norms]:
    """Put the batch-norm layers of `models` under a policy in the body; then leave them as they were."""
    norms = Norms()
    hooks = []
    layers = [m for model in models for m in model.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for model in models:
            model.frozen_norms = layers if policy == "frozen" else []
        for layer in layers if policy == "deferred" else []:
            norms.sums[layer] = None
            hooks.append(layer.register_forward_pre_hook(norms._see))
            # affects training only: in eval mode the running statistics are read all the same
            layer.track_running_stats = False
        yield norms
    finally:
        for hook in hooks:
            hook.remove()
        for layer in norms.sums:
            layer.track_running_stats = True
        for model in models:
            model.frozen_norms = []


def check_norms(policy: str, models: Iterable[BlockModel]) -> None:
    """Raise `ConfigError` for an unknown policy, and `ModelError` for layers that talk to other ranks within a forward."""
    if policy not in POLICIES:
        raise ConfigError(f"no batch norm policy '{policy}'{nearest(policy, POLICIES)}; there are {', '.join(POLICIES)}")
    for model in models:
        for name, module in model.model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise ModelError(
                    f"'{name}' is a SyncBatchNorm, which averages over ranks that run the same layer at the same moment; here a "
                    "layer is on one rank, which runs the microbatches one after the other. Use BatchNorm with "
                    "batch_norm='deferred', whose running statistics are those of whole batches"
                )
