"""Runs code on models and leaves no trace in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def restored(models: Sequence[nn.Module]) -> Iterator[None]:
    """Run the body with no gradients in `models`; then put back their buffers, gradients and modes, and the random state."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [{name: (b, b if b is None else b.clone()) for name, b in m._buffers.items()} for m in modules]
    gradients = [(p, p.grad) for model in models for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode, saved in zip(modules, modes, buffers, strict=True):
            module.training = mode
            module._buffers.clear()  # a forward may have put new tensors in the old ones' place
            for name, (buffer, content) in saved.items():
                module._buffers[name] = buffer
                if buffer is not None and content is not None:
                    with torch.no_grad():
                        buffer.copy_(content)
        for parameter, gradient in gradients:
            parameter.grad = gradient
