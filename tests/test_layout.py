"""The tree of files is what CONTRIBUTING says: short modules, and tests where a newcomer would look for them."""

from __future__ import annotations

import re
from itertools import combinations, product
from pathlib import Path

import pytest
from support.pairwise import covering

ROOT = Path(__file__).parent.parent
SOURCE, TESTS = ROOT / "src" / "pipestill", ROOT / "tests"


def test_no_module_is_longer_than_400_lines() -> None:
    long = {str(path): lines for path in SOURCE.rglob("*.py") if (lines := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_every_test_file_has_the_path_of_a_module_or_is_named_in_contributing() -> None:
    named = set(re.findall(r"`tests/([\w/]+)\.py`", (ROOT / "CONTRIBUTING.md").read_text()))
    lost = []
    for path in TESTS.rglob("test_*.py"):
        place = path.relative_to(TESTS).with_suffix("")
        module = SOURCE / place.parent / place.name.removeprefix("test_")
        if not (module.with_suffix(".py").exists() or (module / "__init__.py").exists() or str(place) in named):
            lost.append(str(place))
    assert lost == []


def test_every_package_has_tests_beside_its_modules() -> None:
    packages = {path.parent.relative_to(SOURCE) for path in SOURCE.rglob("*.py")}
    assert [str(package) for package in packages if not list((TESTS / package).glob("test_*.py"))] == []


@pytest.mark.parametrize("sizes", [[3], [4, 4, 3, 2], [1, 5, 2]])
def test_thinned_out_products_hold_every_pair(sizes: list[int]) -> None:
    rows = covering(sizes)
    assert len(rows) <= len(list(product(*map(range, sizes))))
    for (i, a), (j, b) in combinations(enumerate(sizes), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(range(a), range(b)))
