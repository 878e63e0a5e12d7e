"""The reader: every batch once, known as the last of its epoch, the same on every run."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cases import Refilled
from support.models import Stream, vectors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from pipestill.errors import DataError
from pipestill.runtime.batch import Batch
from pipestill.train.data import LoaderError, Reader, inputs_and_targets, sample


def read(loader: Any, **options: Any) -> list[Batch]:
    reader = Reader(loader, **{"epochs": 1, "steps": None, "seed": 0, "timeout_seconds": 20.0, **options})
    try:
        return list(reader)
    finally:
        reader.close()
        assert not reader._thread.is_alive()


def marks(batches: list[Batch]) -> list[tuple[int, int, bool]]:
    return [(batch.rows, batch.epoch, batch.last) for batch in batches]


def test_epochs_and_their_last_batches() -> None:
    assert marks(read(vectors((4, 4, 2)), epochs=2)) == [
        (4, 0, False), (4, 0, False), (2, 0, True), (4, 1, False), (4, 1, False), (2, 1, True)
    ]  # fmt: skip
    assert marks(read(vectors((4,)), epochs=2)) == [(4, 0, True), (4, 1, True)]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (None, 4, [(4, 0, False), (2, 0, True), (4, 1, False), (2, 1, True)]),
        (None, 3, [(4, 0, False), (2, 0, True), (4, 1, True)]),
        (5, 1, [(4, 0, True)]),
        (1, 9, [(4, 0, False), (2, 0, True)]),
    ],
)
def test_steps_cut_the_data(epochs: int | None, steps: int, expected: list[tuple[int, int, bool]]) -> None:
    assert marks(read(vectors((4, 2)), epochs=epochs, steps=steps)) == expected


def test_nothing_is_read_after_the_last_step() -> None:
    taken = []

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in vectors((4,) * 50):
            taken.append(1)
            yield batch

    assert len(read(endless(), epochs=None, steps=3)) == 3
    assert len(taken) == 3


def test_peek_leaves_the_batch_there() -> None:
    reader = Reader(vectors((4, 2)), epochs=1, steps=None, seed=0)
    assert reader.peek() is reader.peek()
    assert [batch.rows for batch in reader] == [4, 2]
    assert list(reader) == []
    reader.close()


def test_what_is_a_target() -> None:
    x, y = torch.zeros(3), torch.ones(3)
    assert inputs_and_targets((x, y)) == (x, y)
    assert inputs_and_targets([x, y]) == (x, y)
    assert inputs_and_targets(x) == (x, None)
    assert inputs_and_targets({"x": x}) == ({"x": x}, None)
    (batch,) = read([{"a": x, "b": y}], split_batch=lambda item: (item["a"], {"t": item["b"]}))
    assert torch.equal(batch.inputs, x)
    assert torch.equal(batch.targets["t"], y)


def test_the_same_shuffle_on_every_run_whatever_else_is_drawn() -> None:
    data = TensorDataset(torch.arange(20), torch.arange(20))

    def order(seed: int = 0, epochs: int = 2) -> list[list[int]]:
        torch.rand(3)
        return [batch.inputs.tolist() for batch in read(DataLoader(data, 8, shuffle=True), seed=seed, epochs=epochs)]

    before = torch.random.get_rng_state()
    first = order()
    torch.random.set_rng_state(before)
    torch.rand(3)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    assert order() == first
    assert torch.equal(torch.random.get_rng_state(), after)  # as if nothing had been read
    assert first[:3] != first[3:]
    assert order(seed=1) != first
    assert sorted(i for batch in first[:3] for i in batch) == list(range(20))


def test_a_sampler_is_told_the_epoch() -> None:
    class Sampler(RandomSampler):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = TensorDataset(torch.arange(6), torch.arange(6))
    read(DataLoader(data, 4, sampler=Sampler(data)), epochs=3)
    assert Sampler.epochs == [0, 1, 2]


def test_a_loader_may_fill_the_same_tensors_again() -> None:
    """Batches are read ahead: without copies, all of them would hold the last one's numbers."""
    expected = vectors((10,) * 4)
    batches = read(Refilled())
    for batch, (inputs, targets) in zip(batches, expected, strict=True):
        assert torch.equal(batch.inputs, inputs)
        assert torch.equal(batch.targets, targets)


def test_the_loaders_tensors_are_never_written_to() -> None:
    data = vectors((4,))
    (batch,) = read(data)
    batch.inputs.zero_()
    assert data[0][0].any()


def test_a_stream_of_unknown_length() -> None:
    batches = read(DataLoader(Stream(), batch_size=None), epochs=2)
    assert [batch.last for batch in batches] == [False, False, True] * 2
    again = read(DataLoader(Stream(), batch_size=None), epochs=2)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0].inputs, batches[3].inputs)


def broken(after: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from vectors((4,) * after)
    raise OSError("disk is gone")


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        ([], {}, DataError, "the loader gave no batch in epoch 0; expected at least one"),
        (iter(vectors((4,))), {"epochs": 2}, DataError, "the loader gave no batch in epoch 1"),
        ([(torch.zeros(0, 4), torch.zeros(0))], {}, DataError, "batch 0 has no rows; expected at least one sample"),
        ([(torch.zeros(3, 4), torch.zeros(2))], {}, DataError, "batch 0 has 3 rows of inputs and 2 of targets"),
        ([(torch.zeros(3, 4), torch.zeros(()))], {}, DataError, "targets of batch 0: every tensor's first axis"),
        ([((torch.zeros(3), torch.zeros(4)), None)], {}, DataError, "batch 0: every tensor's first axis must count"),
        (["text"], {}, DataError, r"batch 0: expected tensors .*, got no tensor \(str\)"),
        (broken(2), {}, LoaderError, r"the loader failed: OSError: disk is gone \(File .*test_data.py.*, line \d+"),
        (None, {}, LoaderError, "the loader failed: TypeError"),
    ],
)
def test_what_a_loader_does_wrong(loader: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(loader, **options)


def test_batches_before_the_error_arrive() -> None:
    reader = Reader(broken(2), epochs=1, steps=None, seed=0)
    assert next(reader).rows == 4
    with pytest.raises(LoaderError) as caught:
        for _ in range(3):
            next(reader)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(StopIteration):
        next(reader)
    reader.close()


def test_a_loader_that_hangs_is_left_at_the_deadline() -> None:
    """And closing does not wait for it either."""
    release = threading.Event()

    def hangs() -> Iterator[tuple[Tensor, Tensor]]:
        release.wait()
        yield from vectors((4,))

    reader = Reader(hangs(), epochs=1, steps=None, seed=0, timeout_seconds=0.2)
    try:
        with pytest.raises(LoaderError, match=r"waited 0.2 s for batch 0 from the loader; raise timeout_seconds"):
            next(reader)
        reader.close()
        assert reader._thread.is_alive()
    finally:
        release.set()
        reader._thread.join()


def test_closing_early_ends_the_thread() -> None:
    reader = Reader(vectors((4,) * 100), epochs=None, steps=None, seed=0)
    next(reader)
    reader.close()
    assert not reader._thread.is_alive()


def test_a_sample_has_rows_that_differ_in_their_labels() -> None:
    """Or a mean over labels, of rows that all have equally many, would pass for a mean over rows."""
    labels = torch.full((6, 4), 3)
    labels[4, 1:] = labels[2, 2:] = -100
    inputs, targets = sample(Batch(6, 0, False, torch.arange(6), {"labels": labels}))
    assert inputs.tolist() == [0, 4, 1]
    assert targets["labels"][1].tolist() == [3, -100, -100, -100]


def test_sample() -> None:
    inputs, targets = sample(Batch(5, 0, False, {"x": torch.arange(5)}, torch.arange(5)))
    assert inputs["x"].tolist() == targets.tolist() == [0, 1, 2]
    assert sample(Batch(2, 0, False, torch.arange(2)))[0].tolist() == [0, 1]


class Damaged(Dataset[Tensor]):
    """A data set of which nothing can be read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        raise DataError("train.jsonl:7 is no JSON")


def test_what_a_worker_of_the_loader_refuses_is_one_message() -> None:
    with pytest.raises(DataError) as caught:
        read(DataLoader(Damaged(), num_workers=1))
    assert str(caught.value) == "train.jsonl:7 is no JSON"
