"""Folders of images, whole and broken."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipestill.errors import ConfigError, DataError
from pipestill.recipes.datasets import open_images
from pipestill.recipes.image_folders import Folder, image_folders


def tree(path: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 2) -> Path:
    """`count` images a class in `train` and one in `val`, of several modes, sizes and formats."""
    for half, many in (("train", count), ("val", 1)):
        for shade, name in enumerate(classes):
            folder = path / half / name
            folder.mkdir(parents=True)
            for i in range(many):
                mode, suffix = (("RGB", "jpg"), ("L", "png"))[i % 2]
                colour: Any = (200 * shade, 0, 0) if mode == "RGB" else 200 * shade
                Image.new(mode, (20 + i, 12), colour).save(folder / f"{i}.{suffix}")
    return path


def test_folders_of_images_are_read(tmp_path: Path) -> None:
    images = open_images(tree(tmp_path), 16, augment=True)
    assert (images.channels, images.size, images.num_classes) == (3, 16, 2)
    assert (len(images.train), len(images.test)) == (4, 2)  # type: ignore[arg-type]
    assert [label for _, label in images.train] == [0, 0, 1, 1]  # type: ignore[attr-defined]
    image, _ = images.test[1]
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
    assert abs(int(image[0].float().mean()) - 200) < 5
    assert int(image[1].max()) < 10
    train, test = images.loaders(3, augment=True)
    assert [tuple(batch.shape) for batch, _ in train] == [(3, 3, 16, 16), (1, 3, 16, 16)]
    (batch, labels), *_ = test
    assert batch.dtype == torch.float32
    assert labels.tolist() == [0, 1]


def test_workers_read_the_same(tmp_path: Path) -> None:
    images = image_folders(tree(tmp_path), 16, augment=False)
    alone, helped = (list(images.loaders(2, augment=False, workers=workers)[1]) for workers in (0, 1))
    assert torch.equal(alone[0][0], helped[0][0])


def test_broken_folders_are_named(tmp_path: Path) -> None:
    path = tree(tmp_path / "t", ("ant", "bee", "cat"))
    for file in (path / "train/ant").iterdir():
        file.unlink()
    (path / "train/ant/notes.txt").write_text("no image")
    for file in (path / "val/cat").iterdir():
        file.unlink()
    (path / "val/cat").rmdir()
    (path / "val/dog").mkdir()
    with pytest.raises(DataError) as error:
        image_folders(path, 16, augment=False)
    for expected in (
        "val' has a class 'dog' that 'train' lacks", "train/ant' holds no image", "val' lacks the class 'cat'"
    ):  # fmt: skip
        assert expected in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_found_before_training(tmp_path: Path, content: bytes | None) -> None:
    path = tree(tmp_path)
    file = path / "train/dog/0.jpg"
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(DataError, match=r"cannot read image '.*train/dog/0.jpg'"):
        image_folders(path, 16, augment=False)


def test_an_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    images = image_folders(tree(tmp_path), 16, augment=False)
    (tmp_path / "train/cat/0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read image '.*train/cat/0.jpg'"):
        images.train[0]


def test_missing_pillow_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"read with Pillow.*pip install pillow"):
        open_images(path, 16, augment=False)


def test_random_parts_differ_and_the_middle_does_not(tmp_path: Path) -> None:
    gradient = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "g.png")
    samples = ((tmp_path / "g.png", 0),)
    parts = [Folder(samples, 16, random_part=True)[0][0] for _ in range(2)]
    assert not torch.equal(*parts)
    middle = Folder(samples, 16, random_part=False)[0][0]
    assert int(middle.min()) in (16, 17), "columns 16 to 47 of 64, less what resizing mixes"
    assert int(middle.max()) in (46, 47)
