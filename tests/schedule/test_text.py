"""Lines of a schedule's text."""

import pytest

from pipestill.schedule.text import Fields, numbers, pairs, parse_number, parse_numbers, parse_pairs, parse_truth, yes_or_no


@pytest.mark.parametrize("values", [(), (0,), (3, 1, 123456789)])
def test_numbers_are_read_back(values: tuple[int, ...]) -> None:
    fields = {"stash": numbers(values), "other": "1"}
    assert parse_numbers("stash", fields) == values
    assert fields == {"other": "1"}, "what is read is taken out"


@pytest.mark.parametrize("values", [(), ((0, 1),), ((3, 0), (123456789, 2))])
def test_pairs_are_read_back(values: tuple[tuple[int, int], ...]) -> None:
    fields = {"some": pairs(values)}
    assert parse_pairs("some", fields) == values
    assert fields == {}


@pytest.mark.parametrize("text", ["", "0-1", "0/1/2", "1 2", "0/1,2/3"])
def test_wrong_pairs(text: str) -> None:
    with pytest.raises(ValueError, match="expected pairs of whole numbers such as 0/1, with spaces between, or 'none'"):
        parse_pairs("some", {"some": text})


@pytest.mark.parametrize("truth", [True, False])
def test_truths_are_read_back(truth: bool) -> None:
    assert parse_truth("clip", {"clip": yes_or_no(truth)}) is truth


def test_one_number() -> None:
    assert parse_number("window", {"window": "007"}) == 7
    for text in ("", "-1", "1.5", "1 2", "1_0", "\u0661", "1234567890"):
        with pytest.raises(ValueError, match=f"'window: {text}' in a schedule: expected a whole number"):
            parse_number("window", {"window": text})


@pytest.mark.parametrize("text", ["", "1,2", "one", "1 -2"])
def test_wrong_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="expected whole numbers with spaces between, or 'none'"):
        parse_numbers("stash", {"stash": text})


def test_wrong_truth_and_missing_line() -> None:
    with pytest.raises(ValueError, match="'clip: maybe' in a schedule: expected yes or no"):
        parse_truth("clip", {"clip": "maybe"})
    nothing: Fields = {}
    with pytest.raises(KeyError, match="clip"):
        parse_truth("clip", nothing)
