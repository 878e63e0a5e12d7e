"""Chunks: whatever their size, and whether logits are given or made of hidden states, sums and gradients are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipestill as ps
from pipestill.losses import LinearLogits

WORDS = 37
LABELS = torch.tensor([[1, 5, -100, 36], [-100, 0, 2, -100]])


def heads(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hidden states (2, 4, features) of a student and a wider teacher, with weights and biases of their heads."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"student": 6, "teacher": 9}
    made = [
        {
            "hidden": torch.randn(2, 4, size, generator=generator).to(dtype),
            "weight": torch.randn(WORDS, size, generator=generator).to(dtype),
            "bias": torch.randn(WORDS, generator=generator).to(dtype),
        }
        for size in sizes.values()
    ]
    return made[0], made[1]


def computed(head: dict[str, Tensor], scale: float, softcap: float | None) -> Tensor:
    logits = (head["hidden"] @ head["weight"].T + head["bias"]) * scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def gradients(loss: Any, student: Any, teacher: Any, target: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts and, by name, the gradients of `leaves`."""
    for leaf in leaves.values():
        leaf.grad = None
    parts = loss(student, teacher, target)
    sum(parts.values()).backward()
    return {**{n: p.detach() for n, p in parts.items()}, **{n: t.grad for n, t in leaves.items() if t.grad is not None}}


@pytest.mark.parametrize("target", [None, LABELS, {"labels": LABELS, "tokens": torch.tensor([[1.0, 0, 2, 0], [1, 1, 0, 0.5]])}])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 4.0)])
@pytest.mark.parametrize("vocabulary", [None, 30])
def test_a_head_inside_the_loss_gives_what_given_logits_do(
    target: Any, scale: float, softcap: float | None, vocabulary: int | None
) -> None:
    if vocabulary is not None and target is not None:
        return
    student, teacher = heads()
    student = {name: tensor.requires_grad_() for name, tensor in student.items()}
    for size in (None, 1, 3):
        loss = ps.losses.JSD(0.3, 2.0, cross_entropy=1.0, chunk_size=size, vocabulary=vocabulary)
        given = gradients(loss, computed(student, scale, softcap), computed(teacher, scale, softcap), target, student)
        lazy = [LinearLogits(**head, scale=scale, softcap=softcap) for head in (student, teacher)]
        fused = gradients(loss, *lazy, target, student)
        mixed = gradients(loss, lazy[0], computed(teacher, scale, softcap), target, student)
        assert given.keys() == fused.keys() == mixed.keys()
        for name, expected in given.items():
            torch.testing.assert_close(fused[name], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mixed[name], expected, rtol=1e-5, atol=1e-6)


def test_sums_with_factors_of_their_own_get_their_own_gradients() -> None:
    """A batch's parts may count different tokens, and then each sum has another factor."""
    student, teacher = heads()
    leaves = {name: tensor.requires_grad_() for name, tensor in student.items()}
    loss = ps.losses.SoftTarget(2.0, 0.7)
    for logits in (lambda: LinearLogits(**leaves), lambda: computed(leaves, 1.0, None)):
        both = []
        for factors in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.2), (0.2, 0.2)):
            parts = loss.sums(logits(), LinearLogits(**teacher), LABELS)
            total = parts["soft_target"] * factors[0] + parts["cross_entropy"] * factors[1]
            both.append(torch.autograd.grad(total, list(leaves.values())))
        for divergence, label, mixed, alike in zip(*both, strict=True):
            torch.testing.assert_close(mixed, 0.3 * divergence + 0.2 * label)
            torch.testing.assert_close(alike, 0.2 * divergence + 0.2 * label)


def test_a_second_backward_gives_the_same_gradients() -> None:
    student, teacher = heads()
    leaves = [tensor.requires_grad_() for tensor in student.values()]
    parts = ps.losses.SoftTarget()(LinearLogits(**student), LinearLogits(**teacher), LABELS)
    total = 0.5 * torch.stack(list(parts.values())).sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_is_trained_gets_a_gradient() -> None:
    student, teacher = heads()
    student["weight"].requires_grad_()
    teacher["hidden"].requires_grad_()
    sum(ps.losses.SoftTarget()(LinearLogits(**student), LinearLogits(**teacher), LABELS).values()).backward()  # type: ignore[union-attr]
    assert student["weight"].grad is not None
    assert student["hidden"].grad is student["bias"].grad is teacher["hidden"].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_of_another_type_has_gradients_of_that_type(dtype: torch.dtype) -> None:
    student, teacher = heads(dtype)
    leaves = {name: tensor.requires_grad_() for name, tensor in student.items()}
    found = gradients(ps.losses.ForwardKL(), LinearLogits(**leaves), LinearLogits(**teacher), LABELS, leaves)
    assert {t.dtype for n, t in found.items() if n in leaves} == {dtype}
    assert found["forward_kl"].dtype == torch.promote_types(dtype, torch.float32)


def test_a_head_within_autocast_computes_as_its_layer_would() -> None:
    student, teacher = heads()
    leaves = {name: tensor.requires_grad_() for name, tensor in student.items()}
    with torch.autocast("cpu", torch.bfloat16):
        both = [torch.nn.functional.linear(head["hidden"], head["weight"], head["bias"]) for head in (leaves, teacher)]
        expected = gradients(ps.losses.ForwardKL(), *both, LABELS, leaves)
        found = gradients(ps.losses.ForwardKL(), LinearLogits(**leaves), LinearLogits(**teacher), LABELS, leaves)
    assert found["forward_kl"] == expected["forward_kl"]
    for name in leaves:
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


def test_no_tensor_of_tokens_by_words_is_ever_made() -> None:
    words, tokens, size = 500, 64, 4
    leaves = [torch.randn(tokens, size, requires_grad=True), torch.randn(words, size, requires_grad=True)]
    for target in (torch.randint(words, (tokens,)), torch.where(torch.rand(tokens) < 0.5, torch.randint(words, (tokens,)), -100)):
        with Largest() as seen:
            loss = ps.losses.SoftTarget(chunk_size=8)
            parts = loss(LinearLogits(*leaves), LinearLogits(torch.randn(tokens, 6), torch.randn(words, 6)), target)
            sum(parts.values()).backward()  # type: ignore[union-attr]
        assert seen.elements <= 8 * words


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ps.UserError, match=r"weight \(37, 6\), \(vocabulary, features\), cannot take hidden states \(2, 4, 5\)"):
        LinearLogits(torch.zeros(2, 4, 5), torch.zeros(37, 6))
    with pytest.raises(ps.UserError, match=r"the head's bias is \(6,\); expected \(37,\)"):
        LinearLogits(torch.zeros(2, 4, 6), torch.zeros(37, 6), torch.zeros(6))
    with pytest.raises(ps.UserError, match="softcap is 0; expected more than 0"):
        LinearLogits(torch.zeros(2, 4, 6), torch.zeros(37, 6), softcap=0)


def test_costs_can_be_computed_from_tensors_without_content() -> None:
    """`--estimate` takes the loss over PyTorch's meta device, where no number is known."""
    with torch.device("meta"):
        leaves = [torch.randn(6, 4, requires_grad=True), torch.randn(WORDS, 4, requires_grad=True)]
        given = torch.randn(6, WORDS, requires_grad=True)
        labels = torch.zeros(6, dtype=torch.long)
        for student in (given, LinearLogits(*leaves)):
            parts = ps.losses.SoftTarget().sums(student, torch.randn(6, WORDS), labels)
            sum(parts.values()).backward()  # type: ignore[union-attr]
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in (*leaves, given))
