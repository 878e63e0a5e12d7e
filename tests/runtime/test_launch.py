"""One process per rank on this machine. What goes wrong is in test_failures.py."""

import pytest
import torch
from support import targets
from support.models import CLASSES, vectors
from torch import nn
from torch.distributed import DistNetworkError

import pipestill as ps
from pipestill.errors import ConfigError, ModelError, RankFailure, TransportError
from pipestill.runtime.launch import failure_of


def test_the_first_rank_returns() -> None:
    assert ps.launch(targets.who, ("a",), 3, threads=2, timeout_seconds=30.0) == ("a", 0, 2, "0", "gloo")
    tensor = ps.launch(targets.give, ({"x": torch.arange(3)},), 2, threads=1, timeout_seconds=30.0)["x"]
    assert tensor.tolist() == [0, 1, 2]


def test_one_rank() -> None:
    assert ps.launch(targets.who, ("a",), 1, threads=1, timeout_seconds=30.0)[:2] == ("a", 0)


def test_a_result_larger_than_a_pipe() -> None:
    assert ps.launch(targets.give, (torch.ones(1_000_000),), 2, threads=1, timeout_seconds=30.0).sum() == 1_000_000


def test_a_result_that_does_not_pickle() -> None:
    with pytest.raises(RankFailure, match="rank 0 failed: .*pickle"):
        ps.launch(targets.unpicklable, (), 2, threads=1, timeout_seconds=30.0)


def test_a_target_that_does_not_pickle() -> None:
    with pytest.raises(AttributeError, match="pickle"):
        ps.launch(lambda: None, (), 2, threads=1, timeout_seconds=30.0)


def test_a_user_error_has_status_2_and_no_traceback() -> None:
    with pytest.raises(RankFailure, match="^no rows for rank [01]$") as caught:
        ps.launch(targets.raise_data_error_everywhere, (), 2, threads=1, timeout_seconds=30.0)
    assert (caught.value.status, caught.value.detail) == (2, "")


def test_what_failures_say() -> None:
    assert failure_of(1, ModelError("wrong")).status == 2
    assert failure_of(1, ModelError("wrong")).message == "wrong"
    lost = failure_of(1, TransportError("rank 1 waits"))
    assert (lost.status, lost.consequence) == (1, True)
    assert failure_of(0, DistNetworkError("gone")).consequence
    assert failure_of(0, RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Read error: Connection reset")).consequence
    other = failure_of(2, KeyError("k"))
    assert (other.message, other.status, other.consequence) == ("rank 2 failed: KeyError: 'k'", 1, False)
    assert "KeyError" in other.detail


# ---------------------------------------------------------------- the trainer among processes


def test_every_process_ends_with_the_whole_student() -> None:
    outcome = ps.launch(targets.train_with_loader, (2,), 2, threads=1, timeout_seconds=60.0)
    assert outcome["states"][0] == outcome["states"][1]
    result = outcome["result"]
    assert (result.backend, result.steps, result.samples, result.devices) == ("shared memory", 6, 54, 2)
    assert len(result.peak_memory_bytes) == 2
    assert result.plan.costs.interference >= 1.0  # measured: no costs were given
    assert {event.rank for event in result.trace.events} == {0, 1}


def test_every_process_starts_from_the_first_ones_weights() -> None:
    """The last stage's first weights are not its own rank's: the run would be of a model that nobody built."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    task = ps.Distillation(teacher, student, ps.losses.SoftTarget())
    ps.Trainer(task, strategy="reference", microbatches=2, device="cpu").fit(vectors())
    expected = [tensor.tolist() for tensor in student.state_dict().values()]
    assert ps.launch(targets.train_from_other_weights, (), 2, threads=1, timeout_seconds=60.0) == expected


def test_processes_with_other_models_are_refused() -> None:
    with pytest.raises(RankFailure, match=r"'0.weight' is torch.float32 \(4, 4\) in another process and .* \(5, 4\)") as caught:
        ps.launch(targets.train_from_other_weights, (5,), 2, threads=1, timeout_seconds=30.0)
    assert caught.value.status == 2


def test_as_many_processes_as_devices() -> None:
    with pytest.raises(RankFailure, match="2 processes were started, but devices is 3") as caught:
        ps.launch(targets.train_with_loader, (3,), 2, threads=1, timeout_seconds=30.0)
    assert caught.value.status == 2
    assert issubclass(ConfigError, ps.UserError)
