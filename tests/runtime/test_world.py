"""The ranks of a run as a whole. Runs of processes are in test_launch.py."""

from collections.abc import Iterator

import pytest
import torch

from pipestill.errors import ConfigError, DeviceError
from pipestill.runtime.transport.message import Message
from pipestill.runtime.world import OneProcess, choose_device_type, join_world
from pipestill.schedule import Action, Lane


def message(step: int) -> Message:
    return Message(Lane.TOKEN, Action.parse(f"S0U@{step}"), 0, 1)


def test_a_stuck_world_says_which_rank_waits_for_what() -> None:
    def waits(step: int) -> Iterator[Message]:
        yield message(step)

    expected = r"no rank can go on: rank 0 waits for S0U@3 from rank 0 .*; rank 1 waits for S0U@4 from rank 0"
    with pytest.raises(RuntimeError, match=expected):
        OneProcess(2).drive([waits(3), waits(4)])


def test_ranks_take_turns_until_all_have_ended() -> None:
    world, turns = OneProcess(2), list[str]()

    def sends() -> Iterator[Message]:
        turns.append("sends")
        world.transport(0, (), 1.0).send(message(0), [torch.ones(1)])
        yield from ()

    def receives() -> Iterator[Message]:
        turns.append("waits")
        yield message(0)
        turns.append("receives")

    world.drive([receives(), sends()])
    assert turns == ["waits", "sends", "receives"]


def test_one_process_has_everything_in_common() -> None:
    world = OneProcess(2)
    assert world.broadcast(3) == 3
    assert world.gather([1, 2]) == [1, 2]
    assert world.is_main
    tensor = torch.ones(2)
    world.copy_from([tensor], 1)
    world.barrier()
    assert tensor.tolist() == [1, 1]
    assert [world.claim("task"), world.claim("task"), world.claim("other")] == [True, False, True]


def test_a_process_alone_is_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(join_world(3, "cpu", 1.0), OneProcess)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device_type(None, 2) == "cpu"
    with pytest.raises(DeviceError, match="2 CUDA devices asked for, this machine has 0"):
        choose_device_type("cuda", 2)
    with pytest.raises((ConfigError, DeviceError), match="tpu"):
        choose_device_type("tpu", 1)
