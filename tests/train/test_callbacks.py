"""What a person sees of a training."""

import io
import re

import pytest
from rich.console import Console

from pipestill.train.callbacks import Terminal


@pytest.mark.parametrize(
    ("width", "shown"), [(80, " 200/276 -:--:-- loss 0.0112  accuracy 0.9917"), (120, "samples/s  accuracy 0.9917")]
)
def test_the_bar_fits_its_terminal_with_no_time_cut_off(width: int, shown: str) -> None:
    screen = io.StringIO()
    terminal = Terminal(Console(file=screen, width=width, force_terminal=True, color_system=None, legacy_windows=False))
    terminal.start("student alone", 276)
    terminal.validation(180, 8, {"accuracy": 0.9917})
    terminal.step({"step": 200, "loss": 0.0112, "samples_per_second": 1184.0})
    terminal.end()
    last = re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "\n", screen.getvalue()).strip().splitlines()[-1]
    assert shown in last and "\u2026" not in last
    assert 0 < len(last) <= width
