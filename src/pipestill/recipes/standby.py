"""Processes that a training has no stage for: they wait as long as it goes on, and get what it trained.

More devices than there are blocks may take part in blockwise training; a pipeline has at most one stage for each block.
"""

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from pipestill.errors import RankFailure
from pipestill.model.blocks import BlockModel
from pipestill.runtime.world import Processes
from pipestill.train.callbacks import Callback
from pipestill.train.result import Result

_LOOK_SECONDS = 0.2


def train_on_first(
    devices: int, name: str, model: BlockModel, timeout_seconds: float, train: Callable[..., Result]
) -> dict[str, float]:
    """Train a model on the first ranks of the world, while the other ranks wait. All of them have it afterwards.

    Args:
        devices: the number of ranks that train
        name: what the training is called
        model: what is trained
        timeout_seconds: how long the others wait without a sign of life
        train: does the training; called on the ranks that train, with `also` and `world` where others wait

    Returns:
        the training's metrics, on rank 0
    """
    if not dist.is_initialized() or dist.get_world_size() <= devices:
        return train().metrics
    metrics = dict[str, float]()
    if dist.get_rank() < devices:
        metrics = train(also=[Heartbeat(name)], world=Processes(devices)).metrics
        if dist.get_rank() == 0:
            _store().set(_end_key(name), "1")
    else:
        stand_by(name, timeout_seconds)
    _copy_from_rank_0(model)
    return metrics


class Heartbeat(Callback):
    """Counts the events of a training in the process group's store, so that waiting ranks know that rank 0 is alive."""

    def __init__(self, name: str) -> None:
        self._key = _key(name)

    def start(self, description: str, total_steps: int | None) -> None:
        self._beat()

    def step(self, values: dict[str, float]) -> None:
        self._beat()

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self._beat()

    def _beat(self) -> None:
        _store().add(self._key, 1)


def stand_by(name: str, timeout_seconds: float) -> None:
    """Wait until rank 0 has ended the training; `RankFailure` after `timeout_seconds` without a sign of life."""
    store = _store()
    beats, since = -1, time.monotonic()
    while not store.check([_end_key(name)]):
        count = store.add(_key(name), 0)
        if count != beats:
            beats, since = count, time.monotonic()
        elif time.monotonic() - since > timeout_seconds:
            raise RankFailure(
                f"rank {dist.get_rank()} has no stage in the training '{name}' and had no sign of life from rank 0, which has, "
                f"for {timeout_seconds:g} s; raise --timeout_seconds if its steps are meant to take that long"
            )
        time.sleep(_LOOK_SECONDS)


def _copy_from_rank_0(model: BlockModel) -> None:
    """Give every rank the model as rank 0 has it; called on all of them together."""
    world, blocks = Processes(), range(len(model))
    world.copy_from(model.adopt(world.broadcast(model.forms_of(blocks))), 0)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(name: str) -> str:
    return f"pipestill-training-{name}"


def _end_key(name: str) -> str:
    return f"{_key(name)}-end"
