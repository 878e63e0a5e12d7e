"""Names of strategies to compare."""

from dataclasses import replace

import pytest

from pipestill.compare.variants import options_of, variant
from pipestill.errors import ConfigError
from pipestill.recipes.run_options import RunOptions

KNOWN = ("reference", "1f1b", "gpipe", "fill")


def test_variants_of_fill() -> None:
    assert variant("1f1b", KNOWN) == ("1f1b", {})
    assert variant("fill+split+stale", KNOWN) == ("fill", {"split_backward": True, "staleness": 1})
    assert variant("torch-gpipe", KNOWN) == ("torch-gpipe", {})


def test_peers_are_of_workloads_that_run_as_pipelines() -> None:
    with pytest.raises(ConfigError, match="no strategy 'torch-1f1b'; there are reference, dp$"):
        variant("torch-1f1b", ("reference", "dp"))


def test_knobs_of_fill_are_left_to_fill() -> None:
    given = RunOptions(devices=2, strategy="fill", stash="all", staleness=1, split_backward=True, run_ahead=3, costs="costs.json")
    assert options_of("fill", given, KNOWN) == replace(given, costs=None)
    assert options_of("gpipe", given, KNOWN) == RunOptions(devices=2, strategy="gpipe")
    assert options_of("fill+stale", replace(given, staleness=None), KNOWN).staleness == 1
    assert options_of("torch-gpipe", given, KNOWN) == options_of("1f1b", given, KNOWN)
    assert options_of("reference", given, KNOWN) == RunOptions(strategy="reference")


@pytest.mark.parametrize(
    ("name", "message"),
    [("fil", "no strategy 'fil'.*did you mean 'fill'"), ("fill+x", "no variant 'fill+x'"), ("1f1b+split", "no variant")],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        variant(name, KNOWN)
