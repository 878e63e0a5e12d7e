"""A rank dies while it shares a block's rows: the other, which waits for its gradients, ends too, and the cause is told."""

import re
import sys
import time
from pathlib import Path

import pytest
from runtime.test_failures import BOUND_SECONDS, fail
from support import block_targets

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.mark.parametrize(
    ("how", "where", "message"),
    [
        ("kill", 0, r"rank 0 was killed by SIGKILL \(out of memory\?\)"),
        pytest.param("kill", 1, "rank 1 was killed by SIGKILL", marks=pytest.mark.slow),
        pytest.param("raise", 1, "rank 1 failed: ZeroDivisionError: struck", marks=pytest.mark.slow),
    ],
)
def test_a_member_of_a_group_that_dies_ends_the_others(how: str, where: int, message: str, tmp_path: Path) -> None:
    failure = fail(block_targets.train_in_a_group, how, where, str(tmp_path), directory=tmp_path, devices=2)
    struck = float((tmp_path / "struck").read_text())  # which `fail` has looked at only where it is there
    assert 0 < time.monotonic() - struck < BOUND_SECONDS
    assert re.search(message, str(failure)), str(failure)
    assert failure.status == 1
