"""A link: what a transfer between two ranks takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pipestill.errors import PlanError


def check_amount(what: str, amount: float) -> None:
    """Raise `PlanError` for an amount below 0 or without a limit."""
    if not 0 <= amount < float("inf"):
        raise PlanError(f"{what} is {amount}, expected 0 or more")


@dataclass(frozen=True, slots=True)
class Link:
    """What a transfer between two ranks takes: latency_seconds + bytes / bytes_per_second.

    Most of a transfer is beside the work of both ranks. `wake_seconds` and the handling are what it adds to that work.

    Args:
        latency_seconds: seconds of a message without bytes
        bytes_per_second: rate of the link; infinity for a link that takes no time
        wake_seconds: how much later a rank that had to wait for a message gets on with its work: its core slept, and works
            more slowly at first
        handling_seconds: seconds that each message keeps a rank from its work, at either end
        handling_bytes_per_second: rate at which the message's bytes keep it from its work besides

    Raises:
        PlanError: seconds are below 0 or infinite, or a rate is not above 0
    """

    latency_seconds: float = 0.0
    bytes_per_second: float = float("inf")
    wake_seconds: float = 0.0
    handling_seconds: float = 0.0
    handling_bytes_per_second: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("latency_seconds", "wake_seconds", "handling_seconds"):
            check_amount(f"link: {name}", getattr(self, name))
        for name in _RATES:
            if not getattr(self, name) > 0:
                raise PlanError(f"link: {name} is {getattr(self, name)}, expected more than 0")

    def seconds(self, num_bytes: float) -> float:
        """Seconds until so many bytes have arrived.

        Args:
            num_bytes: size of the message
        """
        return self.latency_seconds + num_bytes / self.bytes_per_second

    def only(self) -> Link:
        """The link alone, without what a message adds to the work of the ranks."""
        return Link(self.latency_seconds, self.bytes_per_second)

    def to_json(self) -> dict[str, float | None]:
        """The fields by name. JSON has no infinity, so a rate without a limit is null."""
        return {
            name: None if value == float("inf") and name in _RATES else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: Any) -> Link:
        """Read back what `to_json` gave.

        Args:
            data: the fields by name

        Raises:
            TypeError: it is no object, or a field is unknown
        """
        if not isinstance(data, dict):
            raise TypeError(f"a link is {data!r}, expected an object")
        unlimited = {name: float("inf") for name in _RATES if name in data and data[name] is None}
        return cls(**{**data, **unlimited})


_RATES = ("bytes_per_second", "handling_bytes_per_second")
