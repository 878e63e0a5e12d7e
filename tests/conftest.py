import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the processes that tests start

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("support.fits")
torch.set_num_threads(1)  # sums that are split over threads differ in their last bits

# The suite draws the same examples every time: what it says is about the change. `make fuzz` draws new ones.
settings.register_profile("suite", derandomize=True)
settings.register_profile("fuzz", derandomize=False, print_blob=True)
settings.load_profile("suite")


@pytest.fixture
def quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules without the long search for the fastest: for tests of what they compute."""
    from support.fits import search_less  # not at the top: many tests need no torch model

    search_less(monkeypatch.setattr)
