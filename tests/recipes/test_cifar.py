"""Files in the true format of CIFAR-10, whole and broken."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipestill.errors import DataError
from pipestill.recipes.datasets import open_images

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
