"""A cache that is written while a student is trained, and students that are trained from it without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.caches import examples, language_model, loader, record_on_ranks, student, write
from support.chats import backend, llama
from support.fits import Case, Outcome, assert_same, search_less
from torch import nn
from torch.utils.data import DataLoader

import pipestill as ps
from pipestill.cache.keys import key_of

STEPS = {"epochs": 2}
OPTIONS: dict[str, Any] = {"length_axis": 1, "microbatches": 3}


@pytest.fixture(autouse=True)
def quick_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    search_less(monkeypatch.setattr)


def from_cache(folder: Path, batch_size: int = 4) -> Case:
    """Train a student from a cache, with labels in the loss as well."""
    loss = ps.losses.CachedTopK(kd_ratio=0.5)
    return Case(
        lambda: ps.Supervised(student(), loss),
        lambda: loader(ps.cache.TeacherCache(folder).attach(examples()), batch_size), fit=STEPS, trainer=OPTIONS,
    )  # fmt: skip


def recorded(folder: Path, **knobs: Any) -> tuple[Outcome, int]:
    """Distil with a teacher at hand and write what it says; the outcome, and how many samples were written."""
    loss, teacher = ps.losses.TopKKL(8, kd_ratio=0.5), language_model(1)
    with ps.cache.Writer(folder, teacher, backend(), k=8, dtype="float32") as writer:
        case = Case(
            lambda: ps.Distillation(teacher, student(), ps.cache.Recorded(loss, writer)),
            lambda: loader(ps.cache.keyed(examples())), fit=STEPS, trainer=OPTIONS,
        )  # fmt: skip
        return case.run(**knobs), writer.num_written


def losses(outcome: Outcome) -> Sequence[float]:
    return [step["loss"] for step in outcome.steps]


def test_losses_and_weights_from_a_cache_are_those_with_the_teacher(tmp_path: Path) -> None:
    live, written = recorded(tmp_path, strategy="reference")
    assert written == len(examples())
    cached = from_cache(tmp_path).run("reference")
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    assert [step["top_k_kl"] for step in cached.steps] == pytest.approx([step["top_k_kl"] for step in live.steps], rel=1e-5)
    for name, tensor in cached.state.items():
        torch.testing.assert_close(tensor, live.state[name], rtol=1e-5, atol=1e-6)


def test_a_pipeline_from_a_cache_equals_the_plain_loop(tmp_path: Path) -> None:
    write(tmp_path)
    case = from_cache(tmp_path)
    expected = case.run("reference")
    assert len(expected.steps) == 6
    for strategy, devices in (("fill", 2), ("1f1b", 3), ("gpipe", 2)):
        assert_same(case.run(strategy, devices), expected)


def test_recording_changes_no_result_and_does_not_depend_on_the_schedule(tmp_path: Path) -> None:
    plain = Case(
        lambda: ps.Distillation(language_model(1), student(), ps.losses.TopKKL(8, kd_ratio=0.5)), lambda: loader(examples()),
        fit=STEPS, trainer=OPTIONS,
    )  # fmt: skip
    expected = plain.run("reference")
    found = []
    for name, knobs in (("a", {"strategy": "reference"}), ("b", {"strategy": "fill", "devices": 2})):
        outcome, written = recorded(tmp_path / name, **knobs)
        assert written == len(examples())
        assert_same(outcome, expected)
        found.append(ps.cache.TeacherCache(tmp_path / name))
    for example in examples():
        ours, theirs = (cache.entry(key_of(example)) for cache in found)
        assert all(ours[name].equal(theirs[name]) for name in ours)


def test_batches_and_microbatches_do_not_matter_to_a_cache(tmp_path: Path) -> None:
    """Written with microbatches of one or two rows, read with others: the loss of a whole epoch as one batch is the same."""
    recorded(tmp_path, strategy="reference", microbatches=4)
    whole = Case(
        lambda: ps.Distillation(language_model(1), student(), ps.losses.TopKKL(8, kd_ratio=0.5)), lambda: loader(examples(), 10),
        fit=STEPS, trainer=OPTIONS,
    ).run("reference")  # fmt: skip
    for microbatches in (1, 7):
        cached = from_cache(tmp_path, batch_size=10).run("reference", microbatches=microbatches)
        assert losses(cached) == pytest.approx(losses(whole), rel=1e-5)


def test_sample_batches_are_not_written(tmp_path: Path) -> None:
    teacher = language_model(1)
    with ps.cache.Writer(tmp_path, teacher, backend(), k=8) as writer:
        task = ps.Distillation(teacher, student(), ps.cache.Recorded(ps.losses.TopKKL(8), writer))
        trainer = ps.Trainer(task, strategy="reference", lr=0.1, **OPTIONS)
        trainer.preflight(loader(ps.cache.keyed(examples())))
        assert len(writer) == 0
        trainer.fit(loader(ps.cache.keyed(examples())), steps=1)
        assert len(writer) == 4
    assert len(ps.cache.TeacherCache(tmp_path)) == 4


def test_what_was_written_is_kept_when_a_run_fails(tmp_path: Path) -> None:
    class Late(ps.Callback):
        def step(self, values: dict[str, float]) -> None:
            raise KeyboardInterrupt

    teacher = language_model(1)
    with pytest.raises(KeyboardInterrupt), ps.cache.Writer(tmp_path, teacher, backend(), k=8) as writer:
        task = ps.Distillation(teacher, student(), ps.cache.Recorded(ps.losses.TopKKL(8), writer))
        trainer = ps.Trainer(task, strategy="reference", lr=0.1, callbacks=[Late()], log_every=1, **OPTIONS)
        trainer.fit(loader(ps.cache.keyed(examples())))
    assert len(ps.cache.TeacherCache(tmp_path, verify=True)) == 4


def test_users_own_losses_are_recorded_too(tmp_path: Path) -> None:
    """A mean over rows that knows of no counts, of images in place of text."""
    data = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.arange(6) % 5)
    teacher = nn.Linear(3, 5)

    def loss(student: torch.Tensor, teacher: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        assert list(target) == ["labels"]
        return (student - teacher).square().mean()

    with ps.cache.Writer(tmp_path, teacher, k=3, dtype="float32") as writer:
        task = ps.Distillation(nn.Sequential(teacher), nn.Sequential(nn.Linear(3, 5)), ps.cache.Recorded(loss, writer))
        batches = torch.utils.data.DataLoader(ps.cache.keyed(data), batch_size=3)
        ps.Trainer(task, strategy="reference", lr=0.1, microbatches=2).fit(batches)
    attached = ps.cache.TeacherCache(tmp_path).attach(data)
    inputs, target = next(iter(torch.utils.data.DataLoader(attached, batch_size=6)))
    with torch.no_grad():
        assert target["teacher_ids"].equal(teacher(inputs).topk(3).indices.int())


@pytest.mark.slow
def test_a_llama_learns_from_packed_rows_what_was_cached_of_padded_ones(tmp_path: Path) -> None:
    """By replay, over two ranks: blocks heed the positions of packed rows, and entries are of samples, not of rows."""
    pad, pack = ps.data.PadCollator(0, side="left"), ps.data.PackCollator(40, 0)
    teacher = llama(seed=3)
    with ps.cache.Writer(tmp_path, teacher, backend(), k=8, dtype="float32") as writer:
        ps.cache.fill(writer, teacher, DataLoader(ps.cache.keyed(examples()), batch_size=4, collate_fn=pad))

    def packed(data: Any) -> Any:
        return DataLoader(ps.data.Packed(data, 40), batch_size=2, collate_fn=pack)

    live, cached = (
        Case(task, lambda data=data: packed(data), fit={"steps": 2}, trainer={"microbatches": 2})  # type: ignore[misc]
        for task, data in (
            (lambda: ps.Distillation(llama(seed=3), llama(seed=7), ps.losses.TopKKL(8)), examples()),
            (lambda: ps.Supervised(llama(seed=7), ps.losses.CachedTopK()), ps.cache.TeacherCache(tmp_path).attach(examples())),
        )
    )
    expected = cached.run("reference")
    assert_same(cached.run("fill", 2), expected)
    assert losses(expected) == pytest.approx(losses(live.run("fill", 2)), rel=1e-5)


@pytest.mark.slow
def test_processes_write_and_read_one_cache(tmp_path: Path) -> None:
    """The rank of the loss writes. Every rank reads, since any may be the one that reads the data."""
    found = ps.launch(record_on_ranks, (tmp_path, 2), 2, threads=1, timeout_seconds=60.0)
    assert len(ps.cache.TeacherCache(tmp_path)) == len(examples())
    assert found["cached"] == pytest.approx(found["live"], rel=1e-5)
    task = ps.Supervised(student(), ps.losses.CachedTopK())
    attached = ps.cache.TeacherCache(tmp_path).attach(examples())
    trainer = ps.Trainer(task, strategy="reference", lr=0.05, log_every=1, length_axis=1, microbatches=3)
    assert trainer.fit(loader(attached), epochs=2).losses == found["cached"]
    assert all(tensor.equal(found["weights"][name]) for name, tensor in task.student.state_dict().items())


def test_data_without_keys_is_refused_before_training(tmp_path: Path) -> None:
    writer = ps.cache.Writer(tmp_path, "0123", k=8)
    task = ps.Distillation(language_model(1), student(), ps.cache.Recorded(ps.losses.TopKKL(8), writer))
    with pytest.raises(ps.UserError, match=r"ps\.cache\.keyed\(dataset\) in place of its data set"):
        ps.Trainer(task, strategy="reference", lr=0.1, **OPTIONS).fit(loader(examples()))
    with pytest.raises(ps.UserError, match=r"writer is '.*expected a ps\.cache\.Writer"):
        ps.cache.Recorded(ps.losses.TopKKL(8), str(tmp_path))  # type: ignore[arg-type]
