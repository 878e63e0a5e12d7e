"""Puts back what functions and objects remember in Python: counters, lists, closures, generators of random numbers."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 10_000
"""How many objects are looked at: what a loss remembers is little, what it can reach may be anything."""
_LIBRARIES = {"pipestill", "torch", "numpy", "logging", "threading", "queue", "io", "pathlib", "re", "builtins", "transformers"}
"""Packages whose objects are left alone, but for tensors, modules, containers and generators."""


class Remembered:
    """A snapshot of what some functions and objects remember, which can be put back.

    Attributes, variables of closures, globals that a function names, and the contents of lists, dicts, sets, arrays and
    tensors are kept as they are, and put back in place: whoever else holds a list sees it too.

    Args:
        roots: functions or objects
        apart: modules that are left alone, with everything in them
    """

    def __init__(self, roots: Iterable[object], apart: Iterable[nn.Module] = ()) -> None:
        inside = [part for model in apart for part in (*model.modules(), *model.parameters(), *model.buffers())]
        self._kept: dict[int, object] = {id(one): one for one in inside}  # held, so that no id is used again
        self._undo: list[Callable[[], object]] = []
        for root in roots:
            self._keep(root)

    def put_back(self) -> None:
        """Make everything what it was."""
        for undo in self._undo:
            undo()

    def _keep(self, value: Any) -> None:
        if isinstance(value, (int, float, complex, str, bytes, type, ModuleType)) or value is None:
            return
        if id(value) in self._kept or len(self._kept) >= _MOST:
            return
        self._kept[id(value)] = value
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.requires_grad:
                self._undo.append(partial(_refill, value, value.clone()))
        elif isinstance(value, np.ndarray):
            self._undo.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self._undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, (dict, list, set, deque)):
            self._keep_container(value)
        elif isinstance(value, (tuple, frozenset)):
            self._keep_all(value)
        elif isinstance(value, partial):
            self._keep_all((value.func, *value.args, *value.keywords.values(), value.__dict__))
        elif isinstance(value, MethodType):
            self._keep_all((value.__self__, value.__func__))
        elif isinstance(value, FunctionType):
            self._keep_function(value)
        elif isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] not in _LIBRARIES:
            self._keep(getattr(value, "__dict__", None))

    def _keep_all(self, values: Iterable[object]) -> None:
        for value in values:
            self._keep(value)

    def _keep_container(self, value: dict[Any, Any] | list[Any] | set[Any] | deque[Any]) -> None:
        content = value.copy()
        self._undo.append(partial(_replace, value, content))
        self._keep_all(content.values() if isinstance(content, dict) else content)

    def _keep_function(self, function: FunctionType) -> None:
        """Keep the variables that a function shares with others: those of its closure and the globals that it names."""
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # it has none yet
                continue
            self._undo.append(partial(setattr, cell, "cell_contents", content))
            self._keep(content)
        named = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
        for name, value in named.items():
            if isinstance(value, (int, float, str, list, dict, set, deque)) or value is None:
                self._undo.append(partial(function.__globals__.__setitem__, name, value))
                self._keep(value)
        self._keep_all((function.__dict__, function.__defaults__, function.__kwdefaults__))


def _refill(tensor: Tensor, content: Tensor) -> None:
    """Write a tensor's old content into it."""
    if tensor.shape == content.shape:
        with torch.no_grad():
            tensor.copy_(content)


def _replace(container: Any, content: Any) -> None:
    """Give a container its old content."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


@contextmanager
def modes_and_buffers(models: Iterable[nn.Module]) -> Iterator[None]:
    """Run the body, then put back the modes and the buffers of all modules in `models`."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [{name: (b, b if b is None else b.clone()) for name, b in m._buffers.items()} for m in modules]
    try:
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
