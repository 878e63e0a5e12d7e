"""Accelerators by name: their peaks from data sheets, and the fractions of these that a program is assumed to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipestill.costs import Link
from pipestill.errors import ConfigError, nearest

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
            raise ConfigError(
                f"no device '{name}'{nearest(name, DEVICES)} to compute costs for; there are {', '.join(DEVICES)}"
            )
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
