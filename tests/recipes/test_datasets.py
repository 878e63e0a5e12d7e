"""What a recipe's images are read from, and noise in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipestill.errors import DataError
from pipestill.recipes.datasets import noise, open_images


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


def test_noise_follows_from_its_seed() -> None:
    one, same, other = (noise(3, 8, 10, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(one.train[3][0], same.train[3][0])
    assert not torch.equal(one.train[3][0], other.train[3][0])
    assert not torch.equal(one.train[0][0], one.test[0][0])
