"""Seconds and bytes of blocks, links and stages, and files of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from pipestill.costs import BlockCosts, Costs, Link, StageCosts
from pipestill.errors import ConfigError, PlanError, UserError

amount = st.floats(0.0, 1e6)
num_bytes = st.integers(0, 10**12)


@st.composite
def blocks(draw: st.DrawFn) -> BlockCosts:
    whole = BlockCosts(draw(st.text(max_size=5)), *(draw(amount) for _ in range(3)), *(draw(num_bytes) for _ in range(3)))
    return replace(whole, weight_seconds=draw(st.floats(0.0, whole.backward_seconds)))


links = st.builds(Link, amount, st.floats(1e-3, float("inf"), exclude_min=True))
all_costs = st.builds(
    Costs,
    st.lists(blocks(), min_size=1, max_size=4).map(tuple),
    st.lists(blocks(), max_size=4).map(tuple),
    loss_seconds=amount,
    data_seconds=amount,
    rows=st.integers(1, 64),
    link=links,
    interference=st.floats(1.0, 100.0),
    views=st.lists(amount, min_size=1, max_size=3).map(tuple),
)

SIX = Costs(
    student=tuple(
        BlockCosts(f"s{i}", 1.0 + i, 10.0 + i, 100.0 + i, output_bytes=1000 + i, weight_seconds=4.0 + i) for i in range(4)
    ),
    teacher=tuple(BlockCosts(f"t{i}", 0.5 + i, update_seconds=7.0 + i, output_bytes=2000 + i) for i in range(2)),
    loss_seconds=0.25,
    data_seconds=0.125,
    link=Link(0.5, 100.0),
    interference=1.5,
    views=(1.0, 0.5),
)


# ---------------------------------------------------------------- blocks to stages


def test_stages_add_up_consecutive_blocks() -> None:
    with_features = replace(SIX, student=tuple(replace(b, feature_seconds=i) for i, b in enumerate(SIX.student)))
    assert with_features.stages([1, 3], [1, 1], [(0, 1), (3, 1), (2, 0)]) == StageCosts(
        forward=(1.0, 9.0),
        backward=(10.0, 36.0),
        update=(100.0, 306.0),
        teacher=(0.5, 1.5),
        loss=0.25,
        data=0.125,
        activation_bytes=(1000, 1003),
        teacher_bytes=(2000, 2001),
        link=Link(0.5, 100.0),
        interference=1.5,
        weight=(4.0, 18.0),
        ema=(7.0, 8.0),
        views=(1.0, 0.5),
        feature_seconds=(0, 6),
        feature_bytes=(2001, 2001, 2000),
        feature_gradient_bytes=(1000, 1003, 1002),
    )


def test_feature_losses_take_time() -> None:
    assert BlockCosts("s", 1.0, 2.0, feature_seconds=0.5).seconds == 3.5
    assert Costs((BlockCosts("s", 1.0, 2.0, feature_seconds=0.5),)).scaled(2.0).student[0].feature_seconds == 1.0


def test_seconds_of_a_microbatch_and_of_a_step() -> None:
    """Student blocks take 10 s forward and 46 s backward, teacher blocks 2 s; the second view takes half of that."""
    assert SIX.microbatch_seconds() == 1.5 * 56.0 + 2.0 + 0.25
    assert SIX.microbatch_seconds(teacher_views=2) == 1.5 * 56.0 + 1.5 * 2.0 + 0.25
    assert SIX.seconds_of_step(2) == 2 * 86.25 + 406.0 + 15.0
    assert SIX.seconds_of_step(2, teacher_views=2) == 2 * 87.25 + 406.0 + 15.0


def test_scaled() -> None:
    """Everything that takes time, and nothing that takes room."""
    twice = SIX.scaled(2.0)
    assert twice.seconds_of_step(3) == 2 * SIX.seconds_of_step(3)
    assert twice.student[1] == replace(
        SIX.student[1], forward_seconds=4.0, backward_seconds=22.0, weight_seconds=10.0, update_seconds=202.0
    )
    assert twice.data_seconds == 0.25
    assert (twice.link, twice.interference, twice.views) == (SIX.link, SIX.interference, SIX.views)


def test_uniform() -> None:
    costs = Costs.uniform(3, 1.0, 2.0, 4.0)
    assert [(b.forward_seconds, b.backward_seconds, b.seconds) for b in costs.student] == [(2.0, 4.0, 6.0)] * 3
    assert [b.seconds for b in costs.teacher] == [1.0] * 3
    assert costs.link.seconds(10**9) == 0.0
    assert Costs.uniform(3, 1.0, 2.0, 4.0, teacher=False).teacher == ()
    split = Costs.uniform(3, 1.0, 2.0, 4.0, weight=1.5, views=2)
    assert [(b.backward_seconds, b.weight_seconds) for b in split.student] == [(4.0, 1.5)] * 3
    assert split.views == (1.0, 1.0)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([1, 2], [2], r"student partition \[1, 2\] adds up to 3, the model has 4 blocks"),
        ([4], [3], r"teacher partition \[3\] adds up to 3, the model has 2 blocks"),
        ([4, 0], [2], r"student partition \[4, 0\] has a stage without blocks"),
        ([5, -1], [2], r"student partition \[5, -1\] has a stage without blocks"),
        ([4], [], r"teacher partition \[\] adds up to 0, the model has 2 blocks"),
    ],
)
def test_partition_that_does_not_fit(student: list[int], teacher: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SIX.stages(student, teacher)


# ---------------------------------------------------------------- the limit of a step


def test_busy_seconds() -> None:
    """The first rank reads the data, the last computes the loss."""
    costs = StageCosts((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0), loss=10.0, data=20.0)
    assert costs.busy_seconds(2) == [2 * 11.0 + 5.0 + 20.0, 2 * 24.0 + 6.0]
    assert replace(costs, teacher=()).busy_seconds(1) == [4.0 + 5.0 + 20.0, 16.0 + 6.0]


def test_busy_seconds_of_views_and_a_moving_teacher() -> None:
    """Of three views that cost 1, 0.5 and 2, the teacher sees the first two."""
    costs = StageCosts((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0), ema=(0.25, 0.5), views=(1.0, 0.5, 2.0))
    assert costs.busy_seconds(2, teacher_views=2) == [
        2 * (3.5 * 4.0 + 1.5 * 7.0) + 5.0 + 0.25,
        2 * (3.5 * 6.0 + 1.5 * 8.0) + 6.0 + 0.5,
    ]
    assert costs.limit_seconds_per_step(2, teacher_views=2) == 72.5
    assert costs.limit_seconds_per_step(2) == 2 * (21.0 + 8.0) + 6.5


def test_limit_is_the_work_of_the_most_loaded_rank() -> None:
    costs = StageCosts((1.0, 2.0), (2.0, 2.0), (0.0, 0.0), (1.0, 1.0))
    assert costs.limit_seconds_per_step(8) == 40.0
    assert StageCosts((1.0,), (2.0,), (0.5,)).limit_seconds_per_step(3) == 9.5


def test_limit_with_interference() -> None:
    """Equal ranks disturb each other all the time; a rank that works alone at the end is not disturbed."""
    equal = StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), interference=1.5)
    assert equal.limit_seconds_per_step(1) == pytest.approx(3.0)
    unequal = StageCosts((1.0, 9.0), (0.0, 0.0), (0.0, 0.0), interference=1.5)
    assert unequal.limit_seconds_per_step(1) == 9.0
    assert StageCosts((1.0,), (1.0,), (0.0,), interference=4.0).limit_seconds_per_step(1) == 2.0


def test_limit_where_ranks_had_better_take_turns() -> None:
    """Two ranks that make each other three times slower need as long as one that does the work of both."""
    costs = StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), interference=3.0)
    assert costs.limit_seconds_per_step(1) == 4.0


# ---------------------------------------------------------------- links


def test_link() -> None:
    assert Link(0.5, 100.0).seconds(50) == 1.0
    assert Link(0.5).seconds(10**12) == 0.5


@pytest.mark.parametrize(
    ("latency", "bandwidth", "message"),
    [
        (-1.0, 1.0, "link: latency_seconds is -1.0, expected 0 or more"),
        (float("nan"), 1.0, "link: latency_seconds is nan, expected 0 or more"),
        (0.0, 0.0, "link: bytes_per_second is 0.0, expected more than 0"),
        (0.0, -5.0, "link: bytes_per_second is -5.0, expected more than 0"),
        (0.0, float("nan"), "link: bytes_per_second is nan, expected more than 0"),
    ],
)
def test_impossible_link(latency: float, bandwidth: float, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Link(latency, bandwidth)


# ---------------------------------------------------------------- impossible amounts


@pytest.mark.parametrize(
    "name",
    [
        *("forward_seconds", "backward_seconds", "update_seconds", "weight_seconds"),
        *("parameter_bytes", "output_bytes", "stash_bytes"),
    ],
)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_block_with_an_impossible_amount(name: str, value: float) -> None:
    with pytest.raises(PlanError, match=f"block 'conv1': {name} is {value}, expected 0 or more"):
        BlockCosts("conv1", **{"forward_seconds": 0.0, name: value})


def test_block_whose_part_is_more_than_the_whole() -> None:
    with pytest.raises(PlanError, match=r"block 'conv1': weight_seconds is 2.5, more than all of the backward's 2.0"):
        BlockCosts("conv1", 1.0, 2.0, weight_seconds=2.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ()}, "costs have no view; expected at least one"),
        ({"views": (1.0, -0.5)}, "the cost of a view is -0.5, expected 0 or more"),
        ({"student": ()}, "costs hold no student block; expected at least one"),
        ({"interference": 0.9}, "interference is 0.9, expected 1 or more"),
        ({"interference": float("nan")}, "interference is nan, expected 1 or more"),
        ({"loss_seconds": -1.0}, "loss_seconds is -1.0, expected 0 or more"),
        ({"data_seconds": -1.0}, "data_seconds is -1.0, expected 0 or more"),
    ],
)
def test_impossible_costs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(SIX, **change)


# ---------------------------------------------------------------- files


@given(all_costs)
def test_json_round_trip(costs: Costs) -> None:
    assert Costs.from_json(json.loads(json.dumps(costs.to_json()))) == costs


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(SIX.to_json()))
    assert Costs.load(path) == Costs.load(str(path)) == SIX


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in SIX.to_json().items() if k != key}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        3,
        "costs",
        without("version"),
        {**SIX.to_json(), "version": 2},
        without("student"),
        {**SIX.to_json(), "student": []},
        {**SIX.to_json(), "student": 5},
        {**SIX.to_json(), "student": [5]},
        {**SIX.to_json(), "student": [{}]},
        {**SIX.to_json(), "student": [{"name": "a"}]},
        {**SIX.to_json(), "student": [{"name": "a", "forward_seconds": "fast"}]},
        {**SIX.to_json(), "student": [{"name": "a", "forward_seconds": None}]},
        {**SIX.to_json(), "student": [{"name": "a", "forward_seconds": -1.0}]},
        {**SIX.to_json(), "teacher": [{"name": "a", "forward_seconds": 1.0, "weight": 3}]},
        {**SIX.to_json(), "link": None},
        {**SIX.to_json(), "link": {"speed": 3}},
        {**SIX.to_json(), "link": {"bytes_per_second": 0}},
        {**SIX.to_json(), "interference": "much"},
        {**SIX.to_json(), "loss_seconds": []},
        {**SIX.to_json(), "views": []},
        {**SIX.to_json(), "views": 2},
        {**SIX.to_json(), "views": ["wide"]},
        {**SIX.to_json(), "colour": "blue"},
    ],
)
def test_malformed_json(data: object) -> None:
    """One clear error of the kind that ends the command with status 2."""
    with pytest.raises(UserError) as error:
        Costs.from_json(data)
    assert str(error.value)


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="colour"):
        Costs.from_json({**SIX.to_json(), "colour": "blue"})
    with pytest.raises(ConfigError, match="forward_seconds"):
        Costs.from_json({**SIX.to_json(), "student": [{"name": "a"}]})


def test_teacher_and_link_may_be_left_out() -> None:
    costs = Costs.from_json({"version": 1, "student": [{"name": "a", "forward_seconds": 1.0}]})
    assert costs == Costs((BlockCosts("a", 1.0),))


def test_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read costs file '.*none.json': No such file"):
        Costs.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"cannot read costs file '.*': Is a directory"):
        Costs.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"version: 1", b"\xff\xfe\x00", b"[1, 2"])
def test_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"costs file '.*costs.json' is not JSON"):
        Costs.load(path)
