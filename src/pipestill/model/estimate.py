"""Computes what every block of a pipeline's models costs on a device that is not here, from arithmetic and memory traffic.

One step is taken block by block, as for measuring, but over tensors without content (PyTorch's meta device). Every kernel
advances a clock by its time under a roofline model (Williams et al. 2009): its arithmetic or its memory traffic, whichever
takes longer. Accelerators are known by name: their peaks from data sheets, and the fractions of these that programs reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipestill.costs import Costs, Link
from pipestill.errors import ConfigError, ModelError, nearest
from pipestill.model.blocks import BlockModel
from pipestill.model.measure import Stopwatch
from pipestill.model.nests import distinct_tensors, memory_of, num_bytes
from pipestill.model.profile import Update, costs_of, counted_stashes, microbatch_of, weight_fractions
from pipestill.model.stepwise import call_block, modules_of, stepwise, untouched
from pipestill.model.tasks import Momentum, Task, view
from pipestill.model.without_numbers import WithoutNumbers
from pipestill.optim import OptimizerFactory

MATH_FRACTION = 0.5
"""Assumed: the fraction of the peak arithmetic that matrix products and convolutions reach."""
MEMORY_FRACTION = 0.8
"""Assumed: the fraction of the memory's speed that all other kernels reach."""
LAUNCH_SECONDS = 5e-6
"""Assumed: the seconds from one kernel to the next."""
LINK_LATENCY_SECONDS = 15e-6
"""Assumed: the seconds until the first byte of a message arrives."""

_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Accelerator:
    """A kind of device, with its peaks."""

    name: str
    flops: Mapping[str, float]
    """Floating-point operations a second in dense products, by precision; the first precision is the default."""
    bytes_per_second: float
    """The speed of its memory."""
    memory_bytes: int
    link_bytes_per_second: float
    """The speed of its links to the other devices, in one direction."""


DEVICES = {
    one.name: one
    for one in (
        Accelerator("v100", {"fp32": 15.7e12, "fp16": 125e12}, 900e9, 32 * 2**30, 150e9),
        Accelerator("a100", {"tf32": 156e12, "fp32": 19.5e12, "bf16": 312e12}, 2039e9, 80 * 2**30, 300e9),
        Accelerator("h100", {"tf32": 494.7e12, "fp32": 66.9e12, "bf16": 989.4e12}, 3350e9, 80 * 2**30, 450e9),
        Accelerator("h200", {"tf32": 494.7e12, "fp32": 66.9e12, "bf16": 989.4e12}, 4800e9, 141 * 10**9, 450e9),
    )
}
"""SXM modules, from NVIDIA's data sheets: dense peaks (without sparsity) and NVLink. A v100 has neither tf32 nor bf16."""


@dataclass(frozen=True)
class Machine:
    """A device and the precision that its work is done in."""

    device: Accelerator
    precision: str

    @classmethod
    def parse(cls, text: str) -> Machine:
        """Read a name such as `a100` or `a100:bf16`; `ConfigError` that lists what there is for any other."""
        name, _, precision = text.lower().partition(":")
        if name not in DEVICES:
            raise ConfigError(f"no device '{name}'{nearest(name, DEVICES)} to compute costs for; there are {', '.join(DEVICES)}")
        device = DEVICES[name]
        precision = precision or next(iter(device.flops))
        if precision not in device.flops:
            raise ConfigError(f"a {name} does not compute in {precision}; there are {', '.join(device.flops)}")
        return cls(device, precision)

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, activations and gradients."""
        return _TYPES[self.precision]

    @property
    def link(self) -> Link:
        """The link between any two such devices."""
        return Link(LINK_LATENCY_SECONDS, self.device.link_bytes_per_second)

    def kernel_seconds(self, flops: float, num_bytes: float) -> float:
        """The seconds of a kernel: of its arithmetic or its memory traffic, whichever is longer, and of its launch."""
        arithmetic = flops / (MATH_FRACTION * self.device.flops[self.precision])
        return max(arithmetic, num_bytes / (MEMORY_FRACTION * self.device.bytes_per_second)) + LAUNCH_SECONDS

    def describe(self) -> str:
        """Say in words which device costs are computed for, with everything that is assumed."""
        d = self.device
        return (
            f"computed for {d.name} ({self.precision}: {d.flops[self.precision] / 1e12:g} TFLOP/s, of which "
            f"{MATH_FRACTION:.0%} are reached; memory {d.bytes_per_second / 1e12:g} TB/s, of which {MEMORY_FRACTION:.0%}; "
            f"{LAUNCH_SECONDS * 1e6:g} us a kernel; links {d.link_bytes_per_second / 1e9:g} GB/s after "
            f"{LINK_LATENCY_SECONDS * 1e6:g} us)"
        )


def task_without_memory(build: Callable[[], Task], dtype: torch.dtype) -> Task:
    """Build a task whose models, of any size, take no memory.

    They are built on PyTorch's meta device, or moved there afterwards where their construction reads numbers.
    """
    try:
        with torch.device("meta"):
            task = build()
    except (NotImplementedError, RuntimeError):
        task = build()
    for module in modules_of(task):
        module.to("meta", dtype=dtype)
    return task


def estimate(
    task: Task, machine: Machine, inputs: Any, targets: Any, *, rows: int, optimizer: OptimizerFactory, split: bool = True
) -> Costs:
    """Compute the costs of a microbatch of `rows` rows whose form is that of a sample batch.

    `task` comes from `task_without_memory`. `split`: also compute which fraction of each backward the gradients of the
    weights take; else it is said to be half. Raises `ModelError` for a model or a loss that has to see numbers.
    """
    inputs, targets = (_formed(nest, machine.dtype) for nest in microbatch_of(inputs, targets, rows))
    blocks = task.student_blocks
    with untouched(task), torch.device("meta"), WithoutNumbers(), torch.no_grad():
        _call_once(task, inputs)
    with untouched(task), torch.device("meta"), WithoutNumbers(), counted_stashes(task) as stash:

        def done(what: str, block: int) -> None:
            stash.mark(what, block)
            watch.mark(what, block)

        try:
            with computed_seconds(machine) as watch:
                values = stepwise(task, inputs, targets, done)
        except ModelError as error:
            raise ModelError(f"costs can only be computed for models that do not depend on numbers: {error}") from error
        fractions = [0.5] * len(blocks)
        if split:
            fractions = weight_fractions(blocks, values.student[0], partial(computed_seconds, machine))
    costs = costs_of(
        task,
        watch.seconds,
        rows=rows,
        updates=[_update(blocks, i, optimizer, machine) for i in range(len(blocks))],
        weight_fractions=fractions,
        stash=stash,
        student_bytes=[[num_bytes(value) for value in view] for view in values.student],
        teacher_bytes=[[num_bytes(value) for value in view] for view in values.teacher],
    )
    teacher = costs.teacher
    if isinstance(task, Momentum):  # the teacher's update reads both models' weights and writes its own
        teacher = tuple(dataclasses.replace(b, update_seconds=machine.kernel_seconds(0, 3 * b.parameter_bytes)) for b in teacher)
    return dataclasses.replace(costs, teacher=teacher, link=machine.link, source=machine.describe())


def _call_once(task: Task, inputs: Any) -> None:
    """Call the first block of both models: some look at their model when inputs of such names come first."""
    for role, model in (("teacher", task.teacher_blocks), ("student", task.student_blocks)):
        if model is not None:
            call_block(role, model, 0, view(task, inputs, 0))


@contextmanager
def computed_seconds(machine: Machine) -> Iterator[Stopwatch]:
    """Give, in the body, a stopwatch of the seconds that kernels would take on a machine."""
    with RooflineClock(machine) as clock:
        yield Stopwatch(lambda: clock.now)


class RooflineClock(TorchDispatchMode):
    """A clock that every kernel which PyTorch launches in its context advances by the kernel's computed time."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.machine = machine
        self.now = 0.0
        """Seconds since the clock was made."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and add its time; operations that launch no kernel, such as views, take none."""
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        given, made = distinct_tensors((args, kwargs)), distinct_tensors(out)
        known = set(map(memory_of, given))
        fresh = [tensor for tensor in made if memory_of(tensor) not in known]
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
    """The bytes that a kernel reads of a tensor; an expanded tensor lies in memory once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _formed(nest: Any, dtype: torch.dtype) -> Any:
    """A nest of tensors of the same shapes, without content; floating-point ones have type `dtype`."""

    def formed(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    return pytree.tree_map_only(Tensor, formed, nest)


def _update(model: BlockModel, block: int, make: OptimizerFactory, machine: Machine) -> Update:
    """What the update of one student block takes.

    The real optimizer tells how much state a parameter has: it takes a step on parameters of one element each.
    """
    trained = {n: p for n, p in model.parameters_of(range(block, block + 1)).items() if p.requires_grad}
    if not trained:
        return Update(0.0, 0)
    small = {name: nn.Parameter(torch.ones([1] * p.dim(), dtype=p.dtype)) for name, p in trained.items()}
    for parameter in small.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(small)
    optimizer.step()
    multiples = {name: _state_size(optimizer.state[parameter].values(), parameter) for name, parameter in small.items()}
    state = round(sum(multiples[name] * p.nbytes for name, p in trained.items()))
    weights = num_bytes(list(trained.values()))
    traffic = 3 * weights + 2 * state  # reads weights, gradients and state; writes weights and state
    return Update(machine.kernel_seconds(0, traffic), weights + state)


def _state_size(state: Iterable[Any], parameter: Tensor) -> float:
    """How many times as large as a parameter its optimizer's state is; single numbers, such as counts of steps, are left out."""
    tensors = [tensor for tensor in state if isinstance(tensor, Tensor) and tensor.shape == parameter.shape]
    return sum(tensor.element_size() for tensor in tensors) / parameter.element_size()
