"""Calls a model's forward for some of its blocks: with what arrived, for what travels on."""

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError, UserError
from pipestill.model.families.replay_check import quietly
from pipestill.model.families.replay_layers import Layout, find_layers
from pipestill.model.families.replay_run import Arrived, Crossing, Facts, Observer, Outline, OutOfOrder, Run, Stop, travelling
from pipestill.model.families.replay_samples import check_names, default_inputs, padded_samples
from pipestill.model.families.replay_standins import Shadow
from pipestill.model.nests import describe


class ReplayedModel:
    """A model whose forward can be called for consecutive blocks. `sample`: inputs to find its layers with.

    `outlines`, `owners` and `parameter_owners` are empty until the model was traced: then every call has all layers live.
    """

    def __init__(self, model: nn.Module, sample: Any = None) -> None:
        self.model = model
        inner = pretrained_inside(model) or model
        self.config: Any = getattr(inner, "config", None)
        self.forward_parameters = inspect.signature(inner.forward).parameters
        self.main_input: str = getattr(inner, "main_input_name", next(iter(self.forward_parameters)))
        self.outlines: tuple[Outline, ...] = ()
        """What each layer gives, for when it is skipped."""
        self.owners: dict[int, frozenset[int]] = {}
        """The blocks that own parameters of a module beside the layers, by the module's id."""
        self.parameter_owners: dict[str, set[int]] = {}
        """The blocks that own a parameter, by its name."""
        self.sample = default_inputs(inner, self.config) if sample is None else self.inputs_of(sample)
        self.layout = self._find_layers()
        self._current: Run | None = None
        self._shadow = Shadow(model, self.layout, self._running)

    def _find_layers(self) -> Layout:
        """Find the layers, by a call of the model."""
        first = next(iter(padded_samples(self.sample, self.config).values()))
        with quietly(self.model):
            try:
                return find_layers(self.model, lambda: self.model(**self.arguments(self.beside_weights(first))))
            except UserError:
                raise
            except Exception as error:
                raise ModelError(
                    f"{type(self.model).__name__} cannot be called with the inputs {describe(first)} to find its layers: "
                    f"{type(error).__name__}: {error}; pass cuts=ps.cut_by_replay(model, inputs) with inputs of your own"
                ) from error

    @property
    def blocks(self) -> range:
        """All blocks."""
        return range(len(self.layout.block_names))

    def _running(self) -> Run:
        """The replay that is going on."""
        assert self._current is not None
        return self._current

    @cached_property
    def _own_arguments(self) -> dict[str, Any]:
        """What every call of the model is given beside the inputs."""
        signatures = [self.forward_parameters]
        if any(p.kind is p.VAR_KEYWORD for p in self.forward_parameters.values()):  # they go on to the models inside
            signatures += [inspect.signature(m.forward).parameters for m in self.model.modules() if _is_pretrained(m)]
        return {"use_cache": False} if any("use_cache" in parameters for parameters in signatures) else {}

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call."""
        return {**inputs, **self._own_arguments}

    def beside_weights(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs where the model's weights are, and of their type where both are floating."""
        weight = next(self.model.parameters())

        def beside(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)

        return {name: beside(value) for name, value in inputs.items()}

    def inputs_of(self, value: Any) -> dict[str, Any]:
        """A batch's inputs as the model's keyword arguments."""
        if isinstance(value, Tensor):
            return {self.main_input: value}
        if not isinstance(value, Mapping):
            raise ModelError(f"the inputs are {describe(value)}; expected a dict of the keyword arguments of the model's forward")
        inputs = dict(value)
        check_names(self.model, inputs, self.forward_parameters)
        return inputs

    def replay(
        self, blocks: range, inputs: Mapping[str, Any], arrived: Arrived, before: Callable[[int], None], facts: Facts | None,
        observer: Observer | None = None,
    ) -> Any:  # fmt: skip
        """Call the model's forward for some blocks. Returns its output, or where it stopped."""
        run = Run(
            self.layout, self.owners, self.outlines if facts else (), blocks, arrived, before, torch.is_grad_enabled(),
            observer or Observer(),
        )  # fmt: skip
        if facts is not None and arrived.tensors:
            inputs = facts.filled(inputs, arrived.tensors[0].device)
        before_this, self._current = self._current, run
        self._shadow.refresh()
        try:
            with torch.no_grad():  # what comes before the first live block needs no graph
                run.start()
                return self._shadow.model(**self.arguments(inputs))
        except Stop as stop:
            return stop
        except OutOfOrder as error:
            raise ModelError(
                f"{type(self.model).__name__} {error}, so it cannot be cut at its layers; pass cuts of your own"
            ) from None
        finally:
            self._current = before_this

    def travelling(self, stop: int, inputs: Mapping[str, Any], result: Stop, facts: Facts) -> dict[str, Any]:
        """The value after the block before `stop`, where a replay stopped."""
        crossing = facts.crossings[stop - 1]
        hidden, *more = travelling(f"block '{self.layout.block_names[stop - 1]}'", result.leaves, crossing)
        return {"hidden": hidden, "more": tuple(more), "inputs": facts.inputs_after(crossing, inputs)}

    @staticmethod
    def arrived(value: Mapping[str, Any], crossing: Crossing) -> Arrived:
        """What a stage starts from, of the value before its first block."""
        return Arrived((value["hidden"], *value["more"]), crossing)


def pretrained_inside(model: nn.Module) -> nn.Module | None:
    """The model of `transformers` that this is, or that peft has wrapped; None for any other model."""
    if _is_pretrained(model):
        return model
    peft = any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)
    return next(filter(_is_pretrained, model.modules()), None) if peft else None


def _is_pretrained(module: nn.Module) -> bool:
    """Whether a module is one of the models of `transformers`, which is not imported for that."""
    kinds = type(module).__mro__
    return any(kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in kinds)
