import pytest
import torch
import torch.distributed as dist
from support.block_targets import train_teacher

import pipestill as ps
from pipestill.errors import RankFailure
from pipestill.recipes import standby


@pytest.mark.slow
def test_processes_without_a_stage_get_what_the_others_trained() -> None:
    with_standby = ps.launch(train_teacher, (3,), 3, threads=1, timeout_seconds=60.0)
    without = ps.launch(train_teacher, (2,), 2, threads=1, timeout_seconds=60.0)
    assert with_standby.keys() == without.keys()
    assert all(torch.equal(with_standby[name], tensor) for name, tensor in without.items())


class Store:
    """A group's store in which nothing happens."""

    def check(self, keys: list[str]) -> bool:
        return False

    def add(self, key: str, amount: int) -> int:
        return 0


def test_standing_by_ends_without_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Store)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    with pytest.raises(RankFailure, match="rank 2 has no stage in the training 'teacher' and had no sign of life from rank 0"):
        standby.stand_by("teacher", 0.01)
