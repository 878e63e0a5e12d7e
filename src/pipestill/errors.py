"""The exceptions that Pipestill raises on purpose.

PipestillError                  status 1: something went wrong while running
|-- UserError (ValueError)      status 2: what was asked for cannot be done; the message says what to change
|   |-- ConfigError             an option, a recipe name, a config file
|   |-- UnknownArgument         an argument that a function of ours does not have (also a TypeError)
|   |-- PlanError               partition, placement, schedule knobs
|   |-- ModelError              a model, a loss or a boundary that cannot be pipelined as it is
|   |-- DataError               what the loader yields
|   `-- DeviceError             a device or backend that this machine lacks
|-- ScheduleError               a schedule that the checker refuses
|-- TransportError              a peer is gone, or a wait passed its deadline
|-- TrainingError               training cannot go on (a loss that is not finite)
`-- RankFailure                 one rank of a run failed; holds the first cause
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PipestillError(Exception):
    """Base of all errors raised on purpose."""


class UserError(PipestillError, ValueError):
    """What the user asked for cannot be done; the message says what to change."""


class ConfigError(UserError):
    """An option, a recipe name or a config file is wrong."""


class UnknownArgument(UserError, TypeError):
    """A function or class is given an argument that it does not have; the message names the one that is meant."""


class PlanError(UserError):
    """A partition, a placement or a schedule knob does not fit."""


class ModelError(UserError):
    """A model, a loss or a boundary cannot be pipelined as it is."""


class DataError(UserError):
    """The loader yields something that cannot be trained on."""


class DeviceError(UserError):
    """A device or backend is asked for that this machine lacks."""


class ScheduleError(PipestillError):
    """The checker refuses a schedule; `problems` holds every reason found."""

    def __init__(self, strategy: str, problems: Sequence[str]) -> None:
        self.strategy = strategy
        self.problems = tuple(problems)
        shown = "\n  ".join(self.problems[:20])
        more = f"\n  and {len(self.problems) - 20} more" if len(self.problems) > 20 else ""
        super().__init__(f"schedule '{strategy}' is not valid:\n  {shown}{more}")

    def __reduce__(self) -> tuple[type[ScheduleError], tuple[str, tuple[str, ...]]]:
        return (ScheduleError, (self.strategy, self.problems))


class TransportError(PipestillError):
    """A peer is gone or a wait passed its deadline; names what was awaited."""


class TrainingError(PipestillError):
    """Training cannot go on."""


class RankFailure(PipestillError):
    """One rank of a run failed; every other rank was ended because of it.

    `status` is the exit status that the command line should end with; `detail` is the rank's traceback, or
    empty when the message says it all.
    """

    def __init__(self, message: str, *, status: int = 1, detail: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


def nearest(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known name, or an empty string when nothing is close."""
    names = list(known)
    swapped = [one for one in names if sorted(one) == sorted(str(name))]  # two letters in each other's place
    close = swapped or difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
