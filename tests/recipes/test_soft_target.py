"""The recipe soft-target: its presets, models by name, lists of classes, and a dry run of the published form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipestill.errors import ConfigError, DataError
from pipestill.recipes.estimate import form_of
from pipestill.recipes.image_folders import read_classes
from pipestill.recipes.run import run_recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.soft_target import SoftTarget, tenths

REDUCED: dict[str, Any] = {
    "preset": "imagenet100", "data": "noise", "image_size": 32, "teacher_width": 32, "teacher_depth": 2, "student_width": 4,
    "student_depth": 1, "batch_size": 4,
}  # fmt: skip


def test_the_digits_are_as_they_were() -> None:
    recipe = SoftTarget()
    kept = (recipe.teacher_width, recipe.teacher_depth, recipe.student_width, recipe.student_depth, recipe.batch_size)
    assert kept == (32, 4, 3, 3, 64)
    assert (recipe.epochs, recipe.teacher_epochs, recipe.lr, recipe.teacher_lr, recipe.weight) == (10, 12, 0.1, 0.05, 1.0)
    training = recipe.workload(0).student_training
    assert training.optimizer_options == {"weight_decay": 1e-4, "momentum": 0.9}
    assert SoftTarget(teacher_width=5).teacher_depth == 4


def test_the_published_pair_is_tspipes() -> None:
    recipe = SoftTarget(preset="imagenet", data="noise")
    workload = recipe.workload(0)
    assert (recipe.temperature, recipe.weight, recipe.batch_size, recipe.epochs) == (4.0, 0.1, 16, 200)
    training = workload.student_training
    assert training.optimizer is torch.optim.SGD and training.lr == 0.1
    assert training.optimizer_options == {"weight_decay": 1e-4, "momentum": 0.9, "nesterov": True}
    factor = tenths(200)
    assert [factor(step) for step in (0, 99, 100, 149, 150, 199)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    task = form_of(workload)
    assert task.teacher_blocks is not None
    assert sum(p.numel() for p in task.teacher_blocks.model.parameters()) == 304_326_632, "timm's vit_large_patch16_224"
    assert sum(p.numel() for p in task.student.parameters()) == 60_192_808, "torchvision's resnet152"
    assert (len(task.teacher_blocks), len(task.student_blocks)) == (26, 52)


def test_two_steps_of_the_published_form_at_reduced_width() -> None:
    """Over two ranks and in a plain loop: the same student, bit for bit."""
    states: list[dict[str, Tensor]] = []
    for strategy, devices in (("fill", 2), ("reference", 1)):
        workload = SoftTarget(**REDUCED).workload(0)
        task = workload.task()
        options = RunOptions(devices=devices, strategy=strategy, microbatches=2)
        trainer = workload.trainer(task, options)
        before = task.student.state_dict()["fc.weight"].clone()
        result = trainer.fit(workload.train_loader, steps=2)
        assert result.steps == 2 and not torch.equal(before, task.student.state_dict()["fc.weight"])
        states.append(task.student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_teacher_that_nobody_trained_is_told_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = SoftTarget(**{**REDUCED, "teacher_epochs": 0, "epochs": 1, "student_model": "cnn", "student_depth": 2})
    assert recipe.workload(0, num_samples=8).teacher_origin is not None
    run_recipe(_Short(recipe), RunOptions(strategy="reference"), None)  # type: ignore[arg-type]
    assert "the teacher is not trained here: random weights, as teacher_epochs is 0" in capsys.readouterr().err


class _Short(SoftTarget):
    """The same on few samples."""

    def __init__(self, recipe: SoftTarget) -> None:
        for name, value in vars(recipe).items():
            object.__setattr__(self, name, value)

    def workload(self, seed: int, num_samples: int | None = None) -> Any:
        return super().workload(seed, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_model": "vit-xl"}, "no teacher_model 'vit-xl' .did you mean 'vit-l'.*timm:NAME or torchvision:NAME"),
        ({"student_model": "timm:resnet18", "student_width": 3}, "student_width is for models that are here"),
        ({"student_model": "resnet18", "dropout": 0.1}, "dropout is for a cnn or a vit"),
        ({"image_size": 32}, "the digits are 8 x 8"),
        ({"teacher_depth": 1, "teacher_epochs": -1}, "teacher_epochs is -1.*teacher_depth is 1; expected at least 2"),
    ],
)
def test_wrong_options_are_refused_all_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SoftTarget(**options)


def test_a_preset_without_images_says_where_they_come_from() -> None:
    with pytest.raises(ConfigError, match="preset 'imagenet' reads its images from --data PATH"):
        SoftTarget(preset="imagenet").workload(0)
    with pytest.raises(ConfigError, match="a list of classes is for folders of images"):
        SoftTarget(preset="imagenet", data="noise", classes=__file__).workload(0)


# -- lists of classes -------------------------------------------------------------------------------------------------


def tree(path: Path, classes: tuple[str, ...] = ("n01", "n02", "n03"), empty: str | None = None) -> Path:
    image = pytest.importorskip("PIL.Image")
    for half in ("train", "val"):
        for name in classes:
            (path / half / name).mkdir(parents=True)
            if name != empty:
                image.new("RGB", (10, 12), (9, 9, 9)).save(path / half / name / "1.png")
    return path


def test_only_the_classes_of_the_list_are_learnt_in_its_order(tmp_path: Path) -> None:
    images = tree(tmp_path / "images", empty="n02")  # which is not asked for
    (tmp_path / "list.txt").write_text("# two of them\nn03  a dog\n\nn01\n")
    recipe = SoftTarget(preset="imagenet100", data=str(images), classes=str(tmp_path / "list.txt"), image_size=16)
    found = recipe.images(0)
    assert found.num_classes == 2
    assert [(file.parent.name, label) for file, label in found.train.samples] == [("n03", 0), ("n01", 1)]  # type: ignore[attr-defined]


def test_lists_that_name_what_is_not_there_are_refused_with_all_of_it(tmp_path: Path) -> None:
    images = tree(tmp_path / "images", empty="n02")
    (tmp_path / "list.txt").write_text("n01\nn02\nn04\nn09\n")
    recipe = SoftTarget(preset="imagenet100", data=str(images), classes=str(tmp_path / "list.txt"))
    with pytest.raises(DataError, match="lacks the class 'n04' of the list.*'n09'.*n02' holds no image"):
        recipe.workload(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("# n01\n", "is empty"), ("n01\nn02\nn01\n", "names n01 more than once"), (b"\xff\xfe", "is not text")],
)
def test_broken_lists_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / "list.txt")


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the list of classes"):
        read_classes(tmp_path / "no.txt")
