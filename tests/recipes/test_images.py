"""Batches of images: moved, mirrored and normalised."""

from __future__ import annotations

import pytest
import torch

from pipestill.recipes.datasets import digits
from pipestill.recipes.images import Collate, moved


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


def test_photographs_are_normalised_and_digits_are_not() -> None:
    grey = [(torch.full((3, 2, 2), 128, dtype=torch.uint8), 1)]
    images, labels = Collate(3)(grey)
    assert images[0, :, 0, 0].tolist() == pytest.approx([0.074, 0.205, 0.426], abs=1e-3)
    assert labels.tolist() == [1]
    train, _ = digits(0)
    assert torch.equal(Collate(1)([train[0]])[0][0], train[0][0])
