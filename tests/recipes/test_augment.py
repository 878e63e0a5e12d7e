import io
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pipestill.recipes.augment import (
    Photographs,
    Scans,
    Views,
    Whole,
    blurred,
    grey,
    other_colours,
    part_of,
    turned_hue,
    view_loader,
)
from pipestill.recipes.datasets import noise
from pipestill.recipes.image_folders import image_folders
from pipestill.recipes.images import DEVIATION, MEAN, Images
from pipestill.train.data import Reader

STILL = Scans(8, window=(1.0, 1.0), moved=0.0, turned=0.0, contrast=0.0, noise=0.0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_scans_without_changes_are_the_images() -> None:
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(STILL(list(images)), images)


def test_a_window_shows_a_part() -> None:
    half = Scans(4, window=(0.5, 0.5), moved=0.0, turned=0.0, contrast=0.0, noise=0.0)
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(half(list(images)), images[:, :, 2:6, 2:6])


def test_scans_are_changed_each_in_its_own_way() -> None:
    image = torch.rand(1, 8, 8)
    views = Scans(6)([image] * 40)
    assert views.shape == (40, 1, 6, 6)
    assert torch.pdist(views.flatten(1)).min() > 0
    brighter = Scans(8, window=(1.0, 1.0), moved=0.0, turned=0.0, contrast=0.3, noise=0.0)([image] * 40)
    shares = (brighter / image).flatten(1)
    assert torch.allclose(shares.min(1).values, shares.max(1).values, rtol=1e-3)
    assert 0.7 <= shares.min() < 0.8
    assert 1.2 < shares.max() <= 1.3


def smooth(height: int, width: int) -> Tensor:
    """Bytes (3, height, width) that grow to the right in red and downwards in blue."""
    right, down = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    return torch.stack([down, torch.full_like(down, 128), right]).byte()


def test_photographs_have_one_form_and_scale() -> None:
    views = Photographs(64, solarised=0.5)([smooth(50, 90), smooth(120, 70)])
    assert views.shape == (2, 3, 64, 64)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    pixels = views * deviation + mean
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5
    assert not torch.equal(views[0], Photographs(64)([smooth(50, 90)])[0])


def test_parts_are_of_the_share_that_is_asked_for() -> None:
    image = smooth(200, 200).float() / 255
    for share in ((0.08, 0.1), (0.5, 0.55), (1.0, 1.0)):
        for _ in range(20):
            part = part_of(image, 32, share)
            across = (part[0].max() - part[0].min()) * (part[2].max() - part[2].min())  # the sides, as shares
            assert share[0] * 0.8 < across < share[1] * 1.15 or share == (1.0, 1.0)


def test_changes_of_colour() -> None:
    image = torch.rand(3, 5, 5)
    torch.testing.assert_close(other_colours(image, 0, 0, 0, 0), image)
    turned = turned_hue(image, 0.1)
    torch.testing.assert_close(grey(turned), grey(image))
    assert not torch.allclose(turned, image, atol=0.01)
    torch.testing.assert_close(turned_hue(image, 1.0), image, atol=1e-5, rtol=0)
    flat = torch.full((3, 4, 4), 0.3)
    torch.testing.assert_close(turned_hue(flat, 0.3), flat)


def test_blur_is_a_gaussian() -> None:
    point = torch.zeros(3, 21, 21)
    point[:, 10, 10] = 1.0
    spread = blurred(point, 1.5)[1]
    assert spread.sum() == pytest.approx(1.0, abs=1e-5)
    assert (spread[10, 11] / spread[10, 10]).item() == pytest.approx(torch.tensor(-0.5 / 1.5**2).exp().item(), rel=1e-4)
    torch.testing.assert_close(spread, spread.t())


def images_of_floats(count: int) -> Images:
    data = TensorDataset(torch.rand(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64))
    return Images(data, data, 1, 8, 10)


def first_views(loader: object, seed: int, epochs: int) -> list[Tensor]:
    """The first view of the only batch of each epoch, as a run reads it."""
    reader = Reader(loader, epochs=epochs, steps=None, seed=seed)  # type: ignore[arg-type]
    try:
        return [batch.inputs[0] for batch in reader]
    finally:
        reader.close()


def test_views_follow_the_seed_and_differ_by_epoch() -> None:
    loader = view_loader(images_of_floats(6), (Scans(8), Scans(6)), 6)
    one, again, other = (first_views(loader, seed, 3) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    rows = [sorted(view.flatten(1).sum(1).tolist()) for view in one]
    assert all(a != b for a, b in pairwise(rows)), "the same views in another order"


def test_workers_draw_anew_in_each_epoch_and_follow_the_seed() -> None:
    """Each worker has a generator of its own; the loader's draws its seed from the reader's."""
    loader = view_loader(noise(3, 8, 2, 2, 0), (Photographs(8),), 2, workers=1)
    loader.multiprocessing_context = "fork"  # starts at once, and the reader here is this thread's only other
    one, again = (first_views(loader, 1, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(*one)
    assert not torch.equal(one[0].flip(0), one[1])


def test_views_of_folders_are_parts_of_the_whole_image(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for half in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / half / name).mkdir(parents=True)
            content = io.BytesIO()
            image_module.fromarray(smooth(40, 90).permute(1, 2, 0).numpy()).save(content, "png")
            (tmp_path / half / name / "0.png").write_bytes(content.getvalue())
    images = image_folders(tmp_path, 16, augment=False)
    loader = view_loader(images, (Photographs(16), Photographs(8)), 2)
    assert isinstance(loader.dataset, Whole)
    assert torch.equal(loader.dataset[0][0], smooth(40, 90))
    (inputs, targets) = next(iter(loader))
    assert [view.shape for view in inputs] == [(2, 3, 16, 16), (2, 3, 8, 8)]
    assert targets is None


def test_only_the_first_samples_are_kept() -> None:
    loader = view_loader(images_of_floats(9), (STILL,), 2, num_samples=5)
    assert [batch[0][0].shape[0] for batch in loader] == [2, 2, 1]
    assert Views((STILL, STILL))([(torch.zeros(1, 8, 8), 3)])[1] is None
