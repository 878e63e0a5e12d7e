"""Files in the true formats of CIFAR-10 and of folders of images, whole and broken."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipestill.errors import ConfigError, DataError
from pipestill.recipes.datasets import Collate, Folder, digits, image_folders, moved, noise, open_images

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar(folder: Path, rows: int = 3, **changed: Any) -> Path:
    """CIFAR-10's python version, with `rows` images a file; `changed` replaces what data_batch_2 holds."""
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        data = np.full((rows, 3072), number, dtype=np.uint8)
        data[:, 1024:2048] = 100  # the green plane
        content = {b"batch_label": b"a batch", b"labels": [number] * rows, b"data": data, b"filenames": [b"x.png"] * rows}
        if name == "data_batch_2":
            content |= {key.encode(): value for key, value in changed.items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def test_cifar_is_read_from_its_folder_or_the_one_above(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "cifar-10-batches-py")
    for path in (tmp_path, folder):
        images = open_images(path, 32, augment=False)
        assert (images.channels, images.size, images.num_classes) == (3, 32, 10)
        assert (len(images.train), len(images.test)) == (15, 3)  # type: ignore[arg-type]
    image, label = images.train[4]
    assert (image.shape, image.dtype, int(label)) == ((3, 32, 32), torch.uint8, 1)
    assert (image[0] == 1).all()
    assert (image[1] == 100).all(), "planes are red, green, blue"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"data": np.zeros((3, 3000), np.uint8)}, r"'data' is uint8 \(3, 3000\), expected uint8 \(rows, 3072\)"),
        ({"data": [1, 2]}, "'data' is list"),
        ({"labels": [0, 1]}, "'labels' is 2 values, expected 3 from 0 to 9"),
        ({"labels": [0, 1, 10]}, "expected 3 from 0 to 9"),
        ({"labels": None}, "'labels' is NoneType"),
    ],
)
def test_a_wrong_cifar_file_is_named_with_what_is_wrong(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    folder = cifar(tmp_path / "c", **changed)
    with pytest.raises(DataError, match=f"data_batch_2' is no file of CIFAR-10: .*{expected}"):
        open_images(folder, 32, augment=False)


def test_missing_and_truncated_cifar_files_are_named_together(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "c")
    for name in ("data_batch_3", "test_batch"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(DataError, match=r"data_batch_3' is no file of CIFAR-10.*test_batch' is no file"):
        open_images(folder, 32, augment=False)
    (folder / "data_batch_5").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(DataError, match="lacks data_batch_5, test_batch; unpack CIFAR-10's python version anew"):
        open_images(folder, 32, augment=False)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harmed",)

    folder = cifar(tmp_path / "c", labels=Harm())
    with pytest.raises(DataError, match="CIFAR-10 holds arrays only"):
        open_images(folder, 32, augment=False)
    assert not (tmp_path / "harmed").exists()


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


def test_what_is_no_data_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no directory 'nowhere'"):
        open_images("nowhere", 16, augment=False)
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match=r"is no data set: expected .* found readme.txt"):
        open_images(tmp_path, 16, augment=False)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has no folder 'val'"):
        open_images(tmp_path, 16, augment=False)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="train' has no folder; expected one for each class"):
        open_images(tmp_path, 16, augment=False)


def test_missing_pillow_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"read with Pillow.*pip install pillow"):
        open_images(path, 16, augment=False)


def test_images_are_moved_and_mirrored_as_wholes() -> None:
    images = torch.arange(25.0).view(1, 1, 5, 5).repeat(200, 2, 1, 1) + 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = moved(images, 1)
    assert seen.shape == images.shape
    assert torch.equal(seen[:, 0], seen[:, 1]), "channels move together"
    kinds = {tuple(image.flatten().tolist()) for image in seen[:, 0]}
    assert len(kinds) == 18, "nine places, mirrored or not"
    assert tuple(images[0, 0].flatten().tolist()) in kinds


def test_random_parts_differ_and_the_middle_does_not(tmp_path: Path) -> None:
    gradient = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "g.png")
    samples = ((tmp_path / "g.png", 0),)
    parts = [Folder(samples, 16, random_part=True)[0][0] for _ in range(2)]
    assert not torch.equal(*parts)
    middle = Folder(samples, 16, random_part=False)[0][0]
    assert int(middle.min()) in (16, 17), "columns 16 to 47 of 64, less what resizing mixes"
    assert int(middle.max()) in (46, 47)


def test_photographs_are_normalised_and_digits_are_not() -> None:
    grey = [(torch.full((3, 2, 2), 128, dtype=torch.uint8), 1)]
    images, labels = Collate(3)(grey)
    assert images[0, :, 0, 0].tolist() == pytest.approx([0.074, 0.205, 0.426], abs=1e-3)
    assert labels.tolist() == [1]
    train, _ = digits(0)
    assert torch.equal(Collate(1)([train[0]])[0][0], train[0][0])


def test_noise_follows_from_its_seed() -> None:
    one, same, other = (noise(3, 8, 10, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(one.train[3][0], same.train[3][0])
    assert not torch.equal(one.train[3][0], other.train[3][0])
    assert not torch.equal(one.train[0][0], one.test[0][0])
