"""The recipe `compress`: its presets, what it refuses, and that a student compressed by it does its work."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from pipestill.errors import ConfigError, DataError
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.model.tasks import Supervised
from pipestill.recipes.compress import DATA, SHAPES, Compress
from pipestill.recipes.end_to_end import make_trainer
from pipestill.recipes.evaluate import evaluate
from pipestill.recipes.run import run_recipe
from pipestill.recipes.run_options import Numbers, RunOptions

TINY = {"widths": Numbers((4, 6)), "depths": Numbers((1, 1)), "student_depths": Numbers((1, 1))}


@pytest.mark.parametrize(("preset", "network"), list(product(DATA, ("vgg", "resnet"))))
def test_presets_are_the_published_networks(preset: str, network: str) -> None:
    """As they are, and at an eighth of the width run on noise of their form."""
    recipe = Compress(preset=preset, network=network, data="noise")  # type: ignore[arg-type]
    teacher, student_depths = SHAPES[preset, network]
    assert (recipe.widths, recipe.depths, recipe.hidden) == (teacher.widths, teacher.depths, teacher.hidden)
    assert recipe.student_depths == student_depths
    assert recipe.batch_size == DATA[preset].batch_size
    thin = Compress(
        preset=preset, network=network, data="noise", widths=Numbers(width // 8 for width in recipe.widths),  # type: ignore[arg-type]
        hidden=Numbers(units // 64 for units in recipe.hidden), batch_size=2,
    )  # fmt: skip
    workload = thin.workload(0)
    task = workload.task()
    images, labels = next(iter(workload.train_loader))
    assert images.shape == (2, DATA[preset].channels, DATA[preset].image_size, DATA[preset].image_size)
    contracts = blockwise_dry_run(task, images)
    assert len(contracts.outputs) == len(recipe.widths) + 1
    assert task.teacher.eval()(images).shape == (2, DATA[preset].num_classes)
    assert int(labels.max()) < DATA[preset].num_classes


def test_published_sizes() -> None:
    assert Compress(preset="cifar10").widths == Compress(preset="imagenet").widths == (64, 128, 256, 512, 512)
    assert {DATA[preset].batch_size for preset in ("cifar10", "imagenet")} == {256}
    assert Compress(preset="imagenet").hidden == (4096, 4096)


def test_what_is_given_wins_over_the_preset() -> None:
    recipe = Compress(preset="cifar10", epochs=3, hidden=Numbers((7,)), augment=False)
    assert (recipe.epochs, recipe.hidden, recipe.augment) == (3, (7,), False)
    assert recipe.teacher_epochs == DATA["cifar10"].teacher_epochs


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Compress(
            network="resnet", widths=Numbers((4, 0, 8)), depths=Numbers((1, 1)), hidden=Numbers((3,)), teacher_norm=False,
            batch_size=1, epochs=0, lr=0.0, temperature=-1.0, sgd_momentum=1.0, weight_decay=-1.0, image_size=16, workers=-1,
        )  # fmt: skip
    for expected in (
        "widths is 4,0,8; expected numbers of at least 1", "depths is 1,1, of 2 stages; widths has 3",
        "student_depths is 1,1,1,1, of 4 stages; widths has 3", "hidden is of the classifier of a vgg", "a resnet always has",
        "batch_size is 1; expected at least 2", "epochs is 0", "lr is 0.0; expected more than 0", "temperature is -1.0",
        "sgd_momentum is 1.0", "weight_decay is -1.0", "the digits are 8 x 8", "workers is -1",
    ):  # fmt: skip
        assert expected in str(error.value)


def test_data_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset 'cifar10' reads its images from --data PATH"):
        Compress(preset="cifar10").workload(0)
    with pytest.raises(DataError, match="is no data set"):
        Compress(preset="cifar10", data=str(tmp_path)).workload(0)


def test_teacher_and_student_are_the_same_every_time() -> None:
    one, same, other = (Compress().workload(seed).task() for seed in (0, 0, 1))
    for model in ("teacher", "student"):
        mine, again, different = (getattr(task, model).state_dict() for task in (one, same, other))
        assert all(torch.equal(mine[name], again[name]) for name in mine)
        assert not torch.equal(mine["features.0.weight"], different["features.0.weight"])
    assert sum(p.numel() for p in one.student.parameters()) * 5 < sum(p.numel() for p in one.teacher.parameters())


@pytest.mark.slow
def test_the_student_learns_what_the_teacher_knows() -> None:
    """From chance, by blocks that never saw a label; a smaller network than docs/blockwise.md tells of."""
    recipe = Compress(widths=Numbers((16, 32, 48)), depths=Numbers((1, 1, 1)), student_depths=Numbers((1, 2, 2)), epochs=8)
    workload = recipe.workload(0)
    options = RunOptions(devices=2, strategy="relay-dpu", seed=0)
    plain = RunOptions(strategy="reference", microbatches=1)
    task = workload.task()
    teacher = Supervised(task.teacher, workload.supervised_loss)
    make_trainer(teacher, workload.teacher_training, workload.train_loader, plain).fit(workload.train_loader, epochs=4)
    before = evaluate(task.student, workload.metrics, workload.validation_loader, torch.device("cpu"))["accuracy"]
    result = workload.trainer(task, options).fit(workload.train_loader, epochs=recipe.epochs)
    after = evaluate(task.student, workload.metrics, workload.validation_loader, torch.device("cpu"))["accuracy"]
    assert before < 0.3
    assert after > 0.9
    assert list(result.losses.values())[-1] < 0.2


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Compress(**TINY, epochs=1, teacher_epochs=1, fine_tuning_epochs=1, batch_size=256)  # type: ignore[arg-type]
    assert run_recipe(recipe, RunOptions(strategy="balanced", microbatches=2), None) == {}
    assert list(tmp_path.iterdir()) == []
