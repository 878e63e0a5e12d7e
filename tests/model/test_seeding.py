"""Random numbers depend on where they are drawn only."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipestill.model.seeding import OwnGenerator, derive, seed_block
from pipestill.schedule import Role

CPU = torch.device("cpu")


def drawn(*where: int, role: Role = Role.STUDENT) -> list[float]:
    seed_block(where[0], role, *where[1:], CPU)
    return torch.rand(4).tolist()


def test_the_same_place_draws_the_same() -> None:
    first = drawn(0, 1, 2, 3)
    torch.rand(100)
    drawn(0, 1, 2, 4)
    assert drawn(0, 1, 2, 3) == first


def test_every_place_draws_something_else() -> None:
    places = [(s, b, k, m) for s in range(3) for b in range(4) for k in range(5) for m in range(4)]
    values = {tuple(drawn(*place, role=role)) for place in places for role in Role}
    assert len(values) == 2 * len(places)


def test_derive() -> None:
    assert derive(0, "data", 1) == derive(0, "data", 1)
    seeds = [derive(a, b) for a in range(100) for b in ("x", "y", 12, None)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 23) != derive(12, 3)


OPERATORS: dict[str, Callable[[], object]] = {
    "rand": lambda: torch.rand(5).tolist(),
    "rand_like": lambda: torch.rand_like(torch.zeros(5)).tolist(),
    "randn": lambda: torch.randn(2, 3).tolist(),
    "randint": lambda: torch.randint(100, (5,)).tolist(),
    "randint_like": lambda: torch.randint_like(torch.zeros(5), 100).tolist(),
    "randperm": lambda: torch.randperm(20).tolist(),
    "normal": lambda: torch.normal(0.0, 1.0, (5,)).tolist(),
    "normal_": lambda: torch.zeros(5).normal_().tolist(),
    "uniform_": lambda: torch.zeros(5).uniform_().tolist(),
    "random_": lambda: torch.zeros(5).random_().tolist(),
    "bernoulli": lambda: torch.bernoulli(torch.full((20,), 0.5)).tolist(),
    "multinomial": lambda: torch.multinomial(torch.ones(20), 5).tolist(),
    "poisson": lambda: torch.poisson(torch.full((20,), 4.0)).tolist(),
    "dropout": lambda: nn.Dropout(0.5)(torch.ones(40)).tolist(),
    "shuffled loader": lambda: [x.tolist() for (x,) in DataLoader(TensorDataset(torch.arange(9)), 4, shuffle=True)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_own_generator_neither_disturbs_nor_is_disturbed(name: str) -> None:
    if name in ("rand_like", "randint_like") and "generator" not in getattr(torch.ops.aten, name).overloads():
        pytest.skip(f"{name} takes no generator in this torch, and draws from the default one")
    draw = OPERATORS[name]

    def own(seed: int) -> object:
        with OwnGenerator(torch.Generator().manual_seed(seed)):
            return draw()

    before = torch.random.get_rng_state()
    first = own(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert own(5) == first
    assert own(6) != first


def test_a_named_generator_is_used() -> None:
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3))
    with OwnGenerator(torch.Generator().manual_seed(5)):
        assert torch.equal(torch.rand(4, generator=torch.Generator().manual_seed(3)), expected)


def test_what_is_not_random_is_left_alone() -> None:
    with OwnGenerator(torch.Generator()):
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).tolist() == [[2, 2], [2, 2]]
