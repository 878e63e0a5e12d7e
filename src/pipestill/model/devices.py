"""Accelerators by name: what their data sheets say, and what is assumed of a program that runs on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipestill.costs import Link
from pipestill.errors import ConfigError, nearest

MATH_SHARE, MEMORY_SHARE = 0.5, 0.8
"""Assumed: the share of the peak that products and convolutions reach, and of the memory's speed that all else does."""

LAUNCH_SECONDS, LINK_LATENCY_SECONDS = 5e-6, 15e-6
"""Assumed: from one kernel to the next, and until the first byte of a message is there."""

_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Accelerator:
    """One device of a kind. `flops`: peak of dense products a second, by precision; the first is taken where none is named.

    `bytes_per_second` is of its memory, `link_bytes_per_second` of its links to the others, in one direction.
    """

    name: str
    flops: Mapping[str, float]
    bytes_per_second: float
    memory_bytes: int
    link_bytes_per_second: float


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
        """From `a100` or `a100:bf16`; `ConfigError` with what there is."""
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
        """Of weights, activations and gradients."""
        return _TYPES[self.precision]

    @property
    def link(self) -> Link:
        """Between any two of them."""
        return Link(LINK_LATENCY_SECONDS, self.device.link_bytes_per_second)

    def kernel_seconds(self, flops: float, num_bytes: float) -> float:
        """What a kernel takes: its arithmetic or its memory traffic, whichever is longer, and its launch."""
        arithmetic = flops / (MATH_SHARE * self.device.flops[self.precision])
        return max(arithmetic, num_bytes / (MEMORY_SHARE * self.device.bytes_per_second)) + LAUNCH_SECONDS

    def describe(self) -> str:
        """For a person, with everything that was assumed."""
        d = self.device
        return (
            f"computed for {d.name} ({self.precision}: {d.flops[self.precision] / 1e12:g} TFLOP/s, of which {MATH_SHARE:.0%} are "
            f"reached; memory {d.bytes_per_second / 1e12:g} TB/s, of which {MEMORY_SHARE:.0%}; {LAUNCH_SECONDS * 1e6:g} us a "
            f"kernel; links {d.link_bytes_per_second / 1e9:g} GB/s after {LINK_LATENCY_SECONDS * 1e6:g} us)"
        )
