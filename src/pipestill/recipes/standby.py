"""Processes that a phase has no stage for: they wait as long as it goes on, and get what it trained.

Blocks that learn alone may be shared by more devices than there are blocks; a pipeline has at most a stage a block.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from pipestill.errors import RankFailure
from pipestill.model.blocks import BlockModel
from pipestill.runtime.world import Processes
from pipestill.train.callbacks import Callback

_LOOK_SECONDS = 0.2


class SignsOfLife(Callback):
    """Counts in the group's store whatever rank 0 hears of a phase, for those who wait for it."""

    def __init__(self, phase: str) -> None:
        self.key = _key(phase)
        self.store = dist.distributed_c10d._get_default_store()

    def start(self, description: str, total_steps: int | None) -> None:
        self.store.add(self.key, 1)

    def step(self, values: dict[str, float]) -> None:
        self.store.add(self.key, 1)

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self.store.add(self.key, 1)


def say_over(phase: str) -> None:
    """On rank 0: the phase has ended."""
    dist.distributed_c10d._get_default_store().set(f"{_key(phase)}-over", "1")


def stand_by(phase: str, timeout_seconds: float) -> None:
    """Wait until rank 0 says that the phase is over; `RankFailure` after `timeout_seconds` without a sign of life."""
    store = dist.distributed_c10d._get_default_store()
    heard, since = -1, time.monotonic()
    while not store.check([f"{_key(phase)}-over"]):
        count = store.add(_key(phase), 0)
        if count != heard:
            heard, since = count, time.monotonic()
        elif time.monotonic() - since > timeout_seconds:
            raise RankFailure(
                f"rank {dist.get_rank()} has no stage in phase '{phase}' and heard nothing of rank 0, which has, for "
                f"{timeout_seconds:g} s; raise --timeout_seconds if its steps are meant to take that long"
            )
        time.sleep(_LOOK_SECONDS)


def hand_on(model: BlockModel) -> None:
    """On all ranks: give everybody the model as rank 0 has it."""
    world, blocks = Processes(), range(len(model))
    world.copy_from(model.adopt(world.broadcast(model.forms_of(blocks))), 0)


def _key(phase: str) -> str:
    return f"pipestill-phase-{phase}"
