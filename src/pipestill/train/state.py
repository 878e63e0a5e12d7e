"""The state of a training, from which it can go on: taken from models and optimizers, and put back, in this one place."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import raise_problems
from pipestill.errors import ModelError
from pipestill.optim import OptimizerFactory
from pipestill.train.data import DataOpener

OptimizerState = dict[str, dict[str, Any]]
"""What an optimizer keeps of each parameter, by the parameter's name and the name of the field."""


@dataclass(frozen=True)
class State:
    """The content of a checkpoint, as far as this process trains it. Everything is a copy on the CPU.

    Names are those of the unsplit models, so a state fits every strategy and every number of devices. The state of random
    numbers is not part of it: they follow from the seed and the step.
    """

    step: int
    """Updates that were made."""
    parameters: Mapping[str, Tensor]
    """By "student.NAME", "teacher.NAME" of a teacher that is trained, and names of modules that are trained beside blocks."""
    buffers: Mapping[str, Tensor]
    """Likewise, and by "loss.NAME"."""
    optimizer: OptimizerState
    """Fields of the optimizers by the student's parameter names; empty where none is in use."""


@torch.no_grad()
def load_modules(modules: Mapping[str, nn.Module], state: State) -> None:
    """Put copies of a state's tensors into modules; `ModelError` where it is of others, before anything is changed.

    A buffer that a forward has added, or replaced by one of another form, is put in its place anew.
    """
    owners = {
        f"{prefix}.{name}".rstrip("."): owner
        for prefix, module in modules.items()
        for name, owner in module.named_modules(remove_duplicate=False)
    }
    raise_problems(_strangers(modules, owners, state), ModelError)
    for name, parameter in _parameters(modules).items():
        parameter.copy_(state.parameters[name])
    for name, saved in state.buffers.items():
        owner, _, buffer = name.rpartition(".")
        mine = owners[owner]._buffers.get(buffer)
        if mine is not None and _form(mine) == _form(saved):
            mine.copy_(saved)
        else:
            owners[owner]._buffers[buffer] = saved.clone()


def _strangers(modules: Mapping[str, nn.Module], owners: Mapping[str, nn.Module], state: State) -> Iterator[str]:
    """Yield how a state differs from modules; `owners` are all modules inside them by name."""
    mine = _parameters(modules)
    missing = [*(mine.keys() - state.parameters.keys()), *(_buffers(modules).keys() - state.buffers.keys())]
    unknown = [name for name in state.parameters if name not in mine]
    unknown += [name for name in state.buffers if name.rpartition(".")[0] not in owners]
    yield from (f"the state lacks '{name}'" for name in sorted(missing))
    yield from (f"the state has '{name}', which the models lack" for name in unknown)
    for name in mine.keys() & state.parameters.keys():
        if _form(mine[name]) != _form(state.parameters[name]):
            yield f"'{name}' is {_form(state.parameters[name])} in the state, expected {_form(mine[name])}"


@dataclass(eq=False)
class RunState:
    """The optimizers and the steps of the last run in this process, and what the next run starts from."""

    first_step: int = 0
    """The number of the next run's first step."""
    _loaded: OptimizerState = field(default_factory=dict)
    """Fields of optimizers that the next run starts from."""
    _optimizers: list[tuple[dict[str, nn.Parameter], torch.optim.Optimizer]] = field(default_factory=list)
    """Each with the parameters that it trains, by name."""
    _steps_before: int = 0
    """Steps that were made before the last run began."""
    _steps: int = 0
    """Steps of the last run, once it is over."""
    _data: DataOpener | None = None
    """What a run of the plain loop reads, while it is under way."""

    def start(self, data: DataOpener | None = None) -> int:
        """Begin a run, and give the number of its first step; the run after it begins anew."""
        self._optimizers.clear()
        self._data = data
        self._steps = 0
        self._steps_before = self.first_step
        self.first_step = 0
        return self._steps_before

    def remembering(self, make: OptimizerFactory) -> OptimizerFactory:
        """Make a factory of optimizers that are remembered, and start from what was loaded of their parameters."""
        loaded = self._loaded
        self._loaded = {}

        def made(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = make(parameters)
            load_optimizer_state(parameters, optimizer, loaded)
            self._optimizers.append((parameters, optimizer))
            return optimizer

        return made

    def end(self, steps: int) -> None:
        """End a run of so many steps; the optimizers' fields go to the CPU, as the models do."""
        self._data = None
        self._steps = steps
        for _, optimizer in self._optimizers:
            for fields in optimizer.state.values():
                fields |= {key: value.cpu() for key, value in fields.items() if isinstance(value, Tensor)}

    def take(self, modules: Mapping[str, nn.Module]) -> State:
        """Copy the state as it is now."""
        steps = self._data.counts()[0] if self._data else self._steps
        fields = dict(self._loaded)
        for trained in self._optimizers:
            fields |= optimizer_state(*trained)
        return State(self._steps_before + steps, _copies(_parameters(modules)), _copies(_buffers(modules)), fields)

    def give(self, modules: Mapping[str, nn.Module], state: State) -> None:
        """Put modules into a state that the next run goes on from."""
        load_modules(modules, state)
        self._optimizers.clear()
        self._loaded = dict(state.optimizer)
        self._steps = 0
        self._steps_before = state.step
        self.first_step = state.step


def optimizer_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Copy what an optimizer keeps of each of some parameters."""
    kept = {name: optimizer.state[p] for name, p in parameters.items() if optimizer.state.get(p)}
    return {
        name: {key: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for key, v in fields.items()}
        for name, fields in kept.items()
    }


def load_optimizer_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, saved: OptimizerState) -> None:
    """Put what was kept of parameters of these names into an optimizer; its groups and their rates stay as they are."""
    on_device = {id(p) for group in optimizer.param_groups if _counts_on_device(group) for p in group["params"]}
    for name, parameter in parameters.items():
        if name in saved:
            optimizer.state[parameter] = {
                key: _placed(key, value, parameter, id(parameter) in on_device) for key, value in saved[name].items()
            }


def _placed(key: str, value: Any, parameter: nn.Parameter, counts_on_device: bool) -> Any:
    """Copy a field to where the optimizer expects it: beside the parameter, and numbers of steps mostly on the CPU."""
    if not isinstance(value, Tensor):
        return value
    stays = key == "step" and not counts_on_device
    return value.to("cpu" if stays else parameter.device, copy=True)


def _counts_on_device(group: Mapping[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": p for prefix, module in modules.items() for name, p in module.named_parameters()}


def _buffers(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": b for prefix, module in modules.items() for name, b in module.named_buffers()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
