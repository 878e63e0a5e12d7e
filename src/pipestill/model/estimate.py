"""Costs of blocks computed from arithmetic and memory traffic, for a device that is not here: nothing is computed or stored.

One step is taken block by block, as for measuring, but over tensors without content (PyTorch's meta device), against a clock
that every kernel moves by what a roofline says of it (Williams et al. 2009).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipestill.costs import Costs
from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import detached, start_of
from pipestill.model.devices import Machine
from pipestill.model.nests import distinct_tensors
from pipestill.model.profile import Seconds, assemble, counted_stashes, microbatch_of
from pipestill.model.split import SplitBlock, Unsplittable
from pipestill.model.stepwise import stepwise, untouched
from pipestill.model.tasks import Momentum, Task

Optimizer = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]


def task_without_memory(build: Callable[[], Task], dtype: torch.dtype) -> Task:
    """The task with models of published size that take no memory: built on the meta device, or moved there afterwards where
    their construction reads numbers.
    """
    try:
        with torch.device("meta"):
            task = build()
    except (NotImplementedError, RuntimeError):
        task = build()
    models = [task.student] if task.teacher_blocks is None else [task.student, task.teacher_blocks.model]
    for module in (*models, *([task.loss] if isinstance(task.loss, nn.Module) else [])):
        module.to("meta", dtype=dtype)
    return task


def estimate(
    task: Task, machine: Machine, inputs: Any, targets: Any, *, rows: int, optimizer: Optimizer, split: bool = True
) -> Costs:
    """Costs of a microbatch of `rows` rows, of the form of a sample batch. `task`: of `task_without_memory`.

    `split`: find out what the gradients of the weights take; else they are said to take half of a backward. Raises
    `ModelError` for a model or a loss that has to see numbers.
    """
    inputs, targets = (_formed(nest, machine.dtype) for nest in microbatch_of(inputs, targets, rows))
    blocks = task.student_blocks
    clock = RooflineClock(machine)
    with untouched(task), torch.device("meta"), WithoutNumbers(), counted_stashes(task) as stash:

        def heard(what: str, block: int) -> None:
            stash.mark(what, block)
            clock.mark(what, block)

        try:
            with clock:
                values = stepwise(task, inputs, targets, heard)
        except ModelError as error:
            raise ModelError(f"costs can only be computed for models that do not depend on numbers: {error}") from error
        shares = _weight_shares(blocks, values.student[0], machine) if split else [0.5] * len(blocks)
    costs = assemble(
        task, clock.seconds, rows=rows, shares=shares, stash=stash,
        updates=[_update(blocks, i, optimizer, machine) for i in range(len(blocks))],
        student_bytes=[[_bytes(value) for value in view] for view in values.student],
        teacher_bytes=[[_bytes(value) for value in view] for view in values.teacher],
    )  # fmt: skip
    teacher = costs.teacher
    if isinstance(task, Momentum):  # reads both models' weights and writes its own
        teacher = tuple(
            dataclasses.replace(b, update_seconds=machine.kernel_seconds(0, 3 * b.parameter_bytes)) for b in teacher
        )
    return dataclasses.replace(costs, teacher=teacher, link=machine.link, source=machine.describe())


class RooflineClock(TorchDispatchMode):
    """Sees every kernel that PyTorch would launch, and moves on by what it would take."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.machine, self.now, self.last = machine, 0.0, 0.0
        self.seconds: Seconds = {}

    def mark(self, name: str, index: int) -> None:
        """Hear that a piece of a step is done."""
        self.seconds.setdefault((name, index), []).append(self.now - self.last)
        self.last = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and add its time; views and the like launch nothing."""
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        given, made = distinct_tensors((args, kwargs)), distinct_tensors(out)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        written = made if func._schema.is_mutable else fresh
        if written and func._overloadpacket not in _ALLOCATIONS:
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            self.now += self.machine.kernel_seconds(flops, sum(map(_read, given)) + sum(map(_read, written)))
        return out


_ALLOCATIONS = {
    torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}  # fmt: skip


def _read(tensor: Tensor) -> int:
    """Bytes that pass when a kernel reads a tensor: what is expanded over other tensors lies in memory once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class WithoutNumbers(TorchFunctionMode):
    """Attention as GPUs do it, in one kernel that keeps no matrix of weights (Rabe and Staats 2021; Dao et al. 2022).

    A model that asks for a number gets 1, and False to a question: a mask is taken to leave something out.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer in place of functions that have to."""
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        if func in _QUESTIONS and args[0].is_meta:
            return _QUESTIONS[func]
        return func(*args, **(kwargs or {}))


_QUESTIONS: dict[Any, Any] = {
    Tensor.__bool__: False, Tensor.__int__: 1, Tensor.__index__: 1, Tensor.__float__: 1.0, Tensor.item: 1,
}  # fmt: skip


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    if attn_mask is not None:
        full = (*query.shape[:-1], key.shape[-2])
        attn_mask = attn_mask.to(query.dtype).expand(full)
    trained = any(tensor.requires_grad for tensor in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, trained, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _formed(nest: Any, dtype: torch.dtype) -> Any:
    """Tensors of the same shapes without content, floats of type `dtype`."""

    def formed(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    return pytree.tree_map_only(Tensor, formed, nest)


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct_tensors(value))


def _weight_shares(model: BlockModel, outputs: list[Any], machine: Machine) -> list[float]:
    """Of each block's backward in two halves, the second's share; all of the first block's, whose input has no gradient."""
    shares = [1.0]
    for i in range(1, len(model)):
        entered, _, _ = detached(outputs[i - 1])
        start = start_of(entered)
        value = model.blocks[i].call(entered)
        roots = [(tensor, torch.empty_like(tensor)) for tensor in distinct_tensors(value) if tensor.requires_grad]
        block, clock = SplitBlock(start), RooflineClock(machine)
        try:
            with clock:
                block.input_half(roots)
                clock.mark("input", 0)
                block.weight_half()
                clock.mark("weight", 0)
        except Unsplittable:
            shares.append(0.0)
            continue
        first, second = clock.seconds["input", 0][0], clock.seconds["weight", 0][0]
        shares.append(second / (first + second) if first + second else 0.0)
    return shares


def _update(model: BlockModel, block: int, optimizer: Optimizer, machine: Machine) -> tuple[float, int]:
    """Seconds of a block's update, and bytes of its gradients and its optimizer's state.

    How much state a parameter has is asked of the real optimizer, which gets numbers of 1 for parameters.
    """
    trained = {n: p for n, p in model.parameters_of(range(block, block + 1)).items() if p.requires_grad}
    if not trained:
        return 0.0, 0
    small = {name: nn.Parameter(torch.ones([1] * p.dim(), dtype=p.dtype)) for name, p in trained.items()}
    for parameter in small.values():
        parameter.grad = torch.ones_like(parameter)
    stepper = optimizer(small)
    stepper.step()
    copies = {name: _like(stepper.state[parameter].values(), parameter) for name, parameter in small.items()}
    sizes = {name: p.numel() * p.element_size() for name, p in trained.items()}
    state = round(sum(copies[name] * sizes[name] for name in sizes))
    weights = sum(sizes.values())
    return machine.kernel_seconds(0, 3 * weights + 2 * state), weights + state  # reads all three, writes two of them


def _like(state: Iterable[Any], parameter: Tensor) -> float:
    """How many times as large as a parameter its state is; numbers that count steps are as good as nothing."""
    tensors = [tensor for tensor in state if isinstance(tensor, Tensor) and tensor.shape == parameter.shape]
    return sum(tensor.element_size() for tensor in tensors) / parameter.element_size()
