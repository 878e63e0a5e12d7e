"""The order of measurements."""

from itertools import count

from pipestill.compare.rounds import in_rounds


def test_strategies_take_turns_in_every_round() -> None:
    log, number = list[str](), count()

    def measure(name: str) -> int:
        log.append(name)
        return next(number)

    measured = in_rounds(["a", "b"], 2, measure, lambda: log.append("machine"))
    assert log == ["a", "b", "machine", "a", "b", "machine"]
    assert measured == {"a": [0, 2], "b": [1, 3]}


def test_a_strategy_that_is_named_twice_is_measured_once() -> None:
    assert in_rounds(["a", "a"], 1, len) == {"a": [1]}
