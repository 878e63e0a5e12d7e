"""Features: which blocks are compared, how parts are named, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.feature_cases import attention_maps, deep
from support.models import vectors
from torch import nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.dry_run import dry_run
from pipestill.model.features import LinearMap, select


def task(features: Any, **options: Any) -> ps.Distillation:
    return ps.Distillation(deep(4, 8, 8), deep(4, 6, 6), ps.losses.SoftTarget(), features=features, **options)


def contracts(made: ps.Distillation) -> Any:
    return dry_run(made, *vectors((4,))[0])


def hint(*pairs: tuple[str, Any], **options: Any) -> Any:
    return ps.features(dict(pairs), ps.losses.Hint(), **{"project": True, **options})


def test_parts_and_projectors_are_named_by_term_and_block() -> None:
    made = task({"hint": hint(("0", ["0", "1"])), "end": ps.features({"2": "2"}, ps.losses.LogitsMSE())})
    assert contracts(made).all_parts == ("soft_target", "cross_entropy", "hint.0", "hint.1", "end.logits_mse")
    assert [name for name, _, _ in made.beside] == ["features.hint.0.projector", "features.hint.1.projector"]
    assert [block for _, _, block in made.beside] == [0, 1]
    assert made.demands.features == ((0, 0), (1, 0), (2, 2))


def test_a_scalar_loss_of_outputs_is_not_the_whole_loss() -> None:
    made = ps.Distillation(deep(4, 8), deep(4, 8), lambda s, t, y: F.mse_loss(s, t), features=hint(("0", "0")))
    assert contracts(made).all_parts == ("output", "features")


def test_losses_of_two_values_and_of_three() -> None:
    """A third argument with a default, as torch's own functions have, gets no target."""
    seen = []

    def with_target(student: Any, teacher: Any, target: Any) -> torch.Tensor:
        seen.append(target)
        return F.mse_loss(student, teacher)

    contracts(
        task([ps.features({"2": "2"}, F.mse_loss), ps.features({"2": "2"}, nn.MSELoss()), ps.features({"2": "2"}, with_target)])
    )
    assert all(isinstance(target, torch.Tensor) for target in seen)


def test_a_linear_map_takes_the_widths_that_it_sees() -> None:
    flat, images = LinearMap(1), LinearMap(1)
    flat.fit(torch.zeros(2, 7, 3), torch.zeros(2, 7, 5))
    images.fit(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    assert flat(torch.zeros(2, 7, 3)).shape == (2, 7, 5)
    assert images(torch.zeros(2, 3, 4, 4)).shape == (2, 5, 4, 4)
    again = LinearMap(1)
    again.fit(torch.ones(9, 3), torch.zeros(9, 5))
    assert torch.equal(again.weight, flat.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(hint(("0", "7"))), "features: the student has no block '7'.*its blocks are 0, 1, 2"),
        (lambda: task(hint(("body", "0"))), "features: the teacher has no block 'body'"),
        (lambda: task({"a b": hint(("0", "0"))}), "a term of features is named 'a b'; expected letters, digits and _"),
        (lambda: task({"lr": hint(("0", "0"))}), "features are named lr, which the log itself uses"),
        (lambda: task("0"), "features is '0'; expected ps.features"),
        (lambda: task([3]), "features 'features_0' is 3; expected ps.features"),
        (lambda: ps.features({}, F.mse_loss), "features is of {}; expected a dict of student blocks by teacher blocks"),
        (lambda: ps.features({"0": "0"}, 3), "the loss of features is 3; expected a function"),  # type: ignore[arg-type]
        (lambda: hint(("0", "0"), weight=-1.0), "weight is -1.0; expected 0 or more"),
        (lambda: hint(("0", "0"), project=3), "project is 3; expected True, False, a module"),
        (lambda: task(hint(("0", ["0", "1"]), project=nn.Linear(6, 8))), "has 2 pairs and 1 projectors"),
        (lambda: task(hint(("0", ["0", "0"]))), "the same two blocks twice in one term: features.0.0"),
        (
            lambda: task(ps.features({"0": ["0", "1"]}, nn.PReLU())),
            "the loss of features 'features' has tensors of its own, and compares 2 blocks of the student",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(hint(("0", "0"), project=False)), "block '0': the loss cannot take float32.*project=True for other"),
        (lambda: task(hint(("0", "0"), of="maps")), r"teacher block 0 gives .* which has no 'maps'; attention maps .*eager"),
        (lambda: task({"soft_target": hint(("0", "0"))}), "two parts of the loss are named soft_target"),
        (lambda: task(ps.features({"0": "0"}, lambda s, t: t.mean())), "does not depend on student block 0 .*"),
        (lambda: task(ps.features({"0": "0"}, lambda s, t: s)), "the loss gave .* as 'features'; expected a scalar"),
    ],
)  # fmt: skip
def test_what_is_refused_on_a_sample(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        contracts(make())


def test_which_tensor_of_an_output() -> None:
    hidden, other = torch.zeros(2, 3), torch.ones(2, 4)
    assert select(None, {"hidden": hidden, "more": other}, "it") is hidden
    assert select(None, (hidden, torch.zeros(2, dtype=torch.bool)), "it") is hidden
    assert select(1, (hidden, other), "it") is other
    assert select(lambda value: value["more"] * 2, {"more": other}, "it").sum() == 16
    with pytest.raises(ModelError, match="it gives .* of which this is no tensor to compare; say which"):
        select(None, (hidden, other), "it")


def test_only_what_is_compared_travels() -> None:
    """Not the hidden states beside the maps."""
    made = attention_maps()
    taps = contracts(made).taps
    assert [[form.shape_of(2) for form in tap.values] for tap in taps] == [[(2, 1, 4, 4)], [(2, 1, 4, 4)], [(2, 4, 5)]]
