"""Adds up a block's gradients over the ranks that share its batches, while the backward is still under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 * 2**20  # of gradients that are added up together, as in DDP


class AllReduce:
    """One all-reduce of a block's gradients, in buckets.

    With `overlap`, a bucket goes out as soon as its last gradient is computed; that needs a single backward, after which a
    gradient is complete. Buckets go out in the same order on all ranks.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup, *, overlap: bool) -> None:
        self.group = group
        self.buckets = _buckets(parameters)
        self.under_way: list[tuple[Tensor, Any]] = []
        """The flat gradients of each bucket that has gone out, and its work."""
        self.ready = set[nn.Parameter]()
        """Parameters whose gradient is computed."""
        self.hooks = [p.register_post_accumulate_grad_hook(self._computed) for p in parameters] if overlap else []

    def _computed(self, parameter: nn.Parameter) -> None:
        self.ready.add(parameter)
        while len(self.under_way) < len(self.buckets) and self.ready.issuperset(self.buckets[len(self.under_way)]):
            self._send_next()

    def _send_next(self) -> None:
        flat = flat_gradients(self.buckets[len(self.under_way)])
        self.under_way.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    def finish(self) -> None:
        """Send the buckets that are left, wait for all, and put the sums in the place of the gradients."""
        for hook in self.hooks:
            hook.remove()
        while len(self.under_way) < len(self.buckets):
            self._send_next()
        for bucket, (flat, work) in zip(self.buckets, self.under_way, strict=True):
            work.wait()
            set_flat_gradients(bucket, flat)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one type together, up to `_BUCKET_BYTES`, last first: in the order in which a backward ends."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not buckets or room < size or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= size
    return buckets


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradients of one type one after the other, zeros for those that are missing; then, for each, 1 if it is there.

    They are in one tensor, because one more all-reduce takes longer than all the gradients of a small block.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = [p.grad is not None for p in parameters]
    first = parameters[0]
    return torch.cat(
        [*(gradient.reshape(-1) for gradient in gradients), torch.tensor(there, dtype=first.dtype, device=first.device)]
    )


def set_flat_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Set the gradients from a sum of `flat_gradients` over ranks; a gradient that no rank had is None."""
    *values, there = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for parameter, part, number in zip(parameters, values, there.tolist(), strict=True):
        parameter.grad = part.view_as(parameter).clone() if number else None
