"""An optimizer's state as tensors, so that a block can move to another rank together with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.optim import OptimizerFactory


class OptimizerState:
    """The layout of the state that an optimizer keeps of named parameters: the same on every rank that holds the block.

    It is found out by a step of an optimizer over copies of the parameters, with gradients of zero.
    """

    def __init__(self, make: OptimizerFactory, parameters: Mapping[str, nn.Parameter]) -> None:
        self.templates: list[dict[str, Any]] = []
        """For each parameter: the name of each value of its state, and an example."""
        self.examples: list[Tensor] = []
        """Tensors of the shapes and types that `pack` gives."""
        if parameters:
            copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
            for copy in copies.values():
                copy.grad = torch.zeros_like(copy)
            optimizer = make(copies)
            optimizer.step()
            self.templates = [dict(optimizer.state.get(copy, {})) for copy in copies.values()]
            self.examples = self.pack(optimizer, list(copies.values()))

    def pack(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Which parameters have a state (one number each), then all values of the states in the order of the templates."""
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        packed = [torch.tensor([float(bool(state)) for state in states])]
        for parameter, state, template in zip(parameters, states, self.templates, strict=True):
            for name, example in sorted(template.items()):
                value = state.get(name, example)
                if isinstance(value, Tensor):
                    packed.append(value)
                elif isinstance(value, (int, float)):
                    packed.append(torch.tensor(float(value), dtype=torch.float64))
                elif value is not None:
                    raise ModelError(
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} ('{name}') for a parameter of shape "
                        f"{tuple(parameter.shape)}, which cannot move between ranks; use another strategy than 'balanced', "
                        "or an optimizer whose state consists of tensors and numbers"
                    )
        return packed

    def unpack(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], packed: Sequence[Tensor]
    ) -> None:
        """Give an optimizer the state that `pack` took from another."""
        has_state, rest = packed[0].tolist(), iter(packed[1:])
        for parameter, template, known in zip(parameters, self.templates, has_state, strict=True):
            state: dict[str, Any] = {}
            for name, example in sorted(template.items()):
                if isinstance(example, Tensor):
                    state[name] = next(rest).view_as(example).to(example.device, copy=True)
                elif isinstance(example, (int, float)):
                    state[name] = type(example)(next(rest).item())  # 5 or 5.0, as it was
                else:
                    state[name] = None
            if known:
                optimizer.state[parameter] = state
            else:
                optimizer.state.pop(parameter, None)
