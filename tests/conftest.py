import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the processes that tests start

import pytest
import torch

pytest.register_assert_rewrite("support.fits")
torch.set_num_threads(1)  # sums that are split over threads differ in their last bits
