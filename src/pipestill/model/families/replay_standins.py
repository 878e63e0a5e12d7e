"""A shallow copy of a model in which a replay decides at every layer, and at every module beside the layers, what is called.

Copied are the modules that hold layers, and nothing else: tensors, hooks and the layers themselves are the model's own. So the
model is never changed, and stages that take turns in one process do not disturb each other.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.model.families.replay_layers import Layout


class Decides(Protocol):
    """One replay of a model's forward, which decides what the stand-ins do."""

    def at_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def at_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outlines: "Outlines") -> Any: ...


class _StandIn(nn.Module):
    """A module in the place of another one, which shows all attributes of that other one."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.__dict__["_target"] = target
        for own in ("_parameters", "_buffers", "_modules"):
            self.__dict__[own] = target.__dict__[own]
        del self.__dict__["training"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)

    def __bool__(self) -> bool:
        return bool(self.__dict__["_target"])

    def __len__(self) -> int:
        return len(self.__dict__["_target"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_target"][index]


class Outlines:
    """The outlines of what a module gives: its structure, and shape and type of its tensors, for each form of its inputs."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[Any], Any]] = {}

    def fill(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Any:
        """What the module would give, with `hole`s for tensors. It is run once for each form of its inputs."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        forms = tuple((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else repr(a) for a in leaves)
        key = (forms, device.type != "meta" and torch.is_autocast_enabled(device.type))
        if key not in self._known:
            if len(self._known) > 1000:
                self._known.clear()
            self._known[key] = self._outline(module, leaves, spec)
        outline, out_spec = self._known[key]
        filled = [hole(*leaf, device=device) if isinstance(leaf, _Form) else leaf for leaf in outline]
        return pytree.tree_unflatten(filled, out_spec)

    @staticmethod
    def _outline(module: nn.Module, leaves: list[Any], spec: Any) -> tuple[list[Any], Any]:
        """Run a module, wherever its weights are, and leave nothing but the outline of its output."""
        home = next(module.parameters()).device
        args, kwargs = pytree.tree_unflatten([a.to(home) if isinstance(a, Tensor) else a for a in leaves], spec)
        modes = [(m, m.training) for m in module.modules()]
        with torch.no_grad(), torch.random.fork_rng():
            try:
                module.eval()  # train mode would move the running statistics of batch norms
                given, out_spec = pytree.tree_flatten(module(*args, **kwargs))
            finally:
                for m, mode in modes:
                    m.training = mode
        return [_Form(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in given], out_spec


class _Form(tuple[tuple[int, ...], torch.dtype]):
    """Shape and type of a tensor."""

    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "_Form":
        return super().__new__(cls, (shape, dtype))


def hole(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in the place of one that another stage has: NaN, so that nothing can come of it unnoticed."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device)


class _LayerStandIn(_StandIn):
    """In the place of a layer."""

    def __init__(self, target: nn.Module, number: int, run: Callable[[], Decides]) -> None:
        super().__init__(target)
        self.__dict__["_call"] = lambda args, kwargs: run().at_layer(number, target, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Let the run decide."""
        return self.__dict__["_call"](args, kwargs)


class _ModuleStandIn(_StandIn):
    """In the place of a module with parameters beside the layers."""

    def __init__(self, target: nn.Module, run: Callable[[], Decides]) -> None:
        super().__init__(target)
        outlines = Outlines()
        self.__dict__["_call"] = lambda args, kwargs: run().at_module(target, args, kwargs, outlines)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Let the run decide."""
        return self.__dict__["_call"](args, kwargs)


class Shadow:
    """The shallow copy of a model. `run` gives the replay that is going on when a stand-in is called."""

    def __init__(self, model: nn.Module, layout: Layout, run: Callable[[], Decides]) -> None:
        self._run = run
        self._numbers = {id(model.get_submodule(name)): number for number, name in enumerate(layout.layers)}
        self._copies: dict[int, tuple[nn.Module, nn.Module, dict[str, nn.Module | None]]] = {}
        self._others: dict[int, nn.Module] = {}
        self._holders = {id(m) for name, m in model.named_modules(remove_duplicate=False) if layout.holds_layer(name)}
        self.model = self._shadow(model)

    def _shadow(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a module."""
        key = id(module)
        if key in self._holders:
            if key not in self._copies:
                copy = type(module).__new__(type(module))
                inner: dict[str, nn.Module | None] = {}
                self._copies[key] = (module, copy, inner)
                inner |= {name: None if child is None else self._shadow(child) for name, child in module._modules.items()}
            return self._copies[key][1]
        if key not in self._others:
            if key in self._numbers:
                self._others[key] = _LayerStandIn(module, self._numbers[key], self._run)
            else:
                own = next(module.parameters(), None) is not None
                self._others[key] = _ModuleStandIn(module, self._run) if own else module
        return self._others[key]

    def refresh(self) -> None:
        """Have the copies' attributes as they are in the model now, such as the mode and hooks."""
        for module, copy, inner in self._copies.values():
            object.__setattr__(copy, "__dict__", {**module.__dict__, "_modules": inner})
