"""Divides autograd's graphs: at boundaries between blocks, and a block's backward into two halves.

The value before a boundary becomes the start of a new graph. The new graph's backward leaves the gradients of that value in a
list, from which they go on into the old graph, on this rank or another.

The two halves of a block's backward are the gradient of its input first, and those of its weights later. A block's graph has a
*spine*, the nodes from which its input can be reached, and beside it nodes that lead to weights alone:

    output <- [linear] <- [gelu] <- [linear] <- input        (<- gradients flow this way)
                  |                     |
                weights               weights

The first half runs the spine and keeps, at every node where weights branch off, the gradients that arrive there. The
second half runs each of these nodes again for its weights alone. Nothing is computed twice but what a node cannot compute
apart, and each weight's gradient is made by the same kernels from the same numbers as in a whole backward.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils import _pytree as pytree

from pipestill.model.nests import copied, distinct_tensors

Roots = list[tuple[Tensor, Tensor]]
"""Outputs of a block, each with the gradient that came back for it."""


class _GraphStart(torch.autograd.Function):
    """A node that starts a graph at given tensors and hands out the gradients that reach it, unchanged.

    Autograd's own leaves would do for most models. But they refuse to be written to in place, and they keep gradients in
    their own memory format instead of the one in which the gradients came.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, gradients: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.gradients[:] = gradients
        return (None, None, *(None for _ in gradients))


def start_graph(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Start a new graph at `tensors`. Returns the tensors in that graph, and a list that its backward fills.

    After the backward, the list holds the gradient of each tensor, or None for a tensor that was not used.
    """
    gradients: list[Tensor | None] = [None] * len(tensors)
    if not tensors:
        return [], gradients
    start = torch.zeros((), requires_grad=True)
    entered = _GraphStart.apply(start, gradients, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]
    return list(entered), gradients


class Detached(NamedTuple):
    """A nest as the start of a new graph, and what joins it to the old one."""

    value: Any
    """The same nest, over tensors of the new graph."""
    tracked: list[Tensor]
    """The distinct tensors of the old nest that carry the old graph."""
    gradients: list[Tensor | None]
    """The gradient of each of `tracked`, once the new graph's backward has run; None before, or where it is not used."""


def detached(value: Any, *, copies: bool = False) -> Detached:
    """Start a new graph at a nest, at those of its tensors that carry a graph.

    `copies`: the new graph is of copies of the tensors, since others write to them in place.
    """
    tracked = [tensor for tensor in distinct_tensors(value) if tensor.requires_grad]
    entered, gradients = start_graph(tracked)
    fresh = {id(old): new for old, new in zip(tracked, entered, strict=True)}
    nest = pytree.tree_map_only(Tensor, lambda t: fresh.get(id(t), t), value)
    return Detached(copied(nest) if copies else nest, tracked, gradients)


def with_exit(outputs: Iterable[tuple[Tensor, Tensor | None]], exit: Detached | None) -> Roots:
    """Find where a backward starts: outputs of blocks with the gradients that came back for them, where any did.

    `exit` is another graph that began at the same outputs, or None: its gradients are added to the others, never in another
    order, so that each sum is rounded the same wherever the graphs run.
    """
    found = {id(tensor): (tensor, gradient) for tensor, gradient in outputs if gradient is not None}
    for tensor, gradient in zip(exit.tracked, exit.gradients, strict=True) if exit is not None else ():
        if gradient is not None:
            found[id(tensor)] = tensor, found[id(tensor)][1] + gradient if id(tensor) in found else gradient
    return list(found.values())


def start_of(value: Any) -> Tensor | None:
    """Find the leaf of autograd at which the graph of a nest begins; None where the nest carries no graph.

    The nest comes from `start_graph` or `detached`, and nothing may have written to it in place yet.
    """
    entered = [tensor for tensor in distinct_tensors(value) if tensor.requires_grad]
    if not entered:
        return None
    node = entered[0].grad_fn
    assert node is not None and node.next_functions[0][0] is not None
    start: Tensor = node.next_functions[0][0].variable  # type: ignore[attr-defined]
    return start


@dataclass
class _Branch:
    """A node of the spine where weights branch off."""

    node: Node
    weights: list[Tensor]
    arrived: tuple[Tensor | None, ...] = ()
    """The gradients that reached the node in the first half, one for each of its outputs."""


@dataclass
class SplitBlock:
    """The backward of one forward of one block, in two halves."""

    start: Tensor | None
    """The leaf at which the block's graph begins (see `boundary.start_of`); None where its input carries no graph."""
    branches: list[_Branch] = field(default_factory=list)
    """Between the halves: the nodes that the second half runs again."""
    whole: Roots = field(default_factory=list)
    """Between the halves of a block without a start: the whole backward, which the second half runs."""

    def input_half(self, roots: Roots) -> None:
        """Run the backward down to the block's input, without the gradients of weights."""
        if self.start is None:
            self.whole = roots
            return
        self.branches = _branches([tensor for tensor, _ in roots], self.start)
        hooks = [branch.node.register_prehook(partial(setattr, branch, "arrived")) for branch in self.branches]
        tensors, gradients = [tensor for tensor, _ in roots], [gradient for _, gradient in roots]
        torch.autograd.backward(tensors, gradients, retain_graph=True, inputs=[self.start])
        for hook in hooks:
            hook.remove()

    def weight_half(self) -> None:
        """Add the gradients of the block's weights to those that the weights have."""
        if self.whole:
            torch.autograd.backward([tensor for tensor, _ in self.whole], [gradient for _, gradient in self.whole])
        for branch in self.branches:
            edges = [(GradientEdge(branch.node, i), g) for i, g in enumerate(branch.arrived) if g is not None]
            if edges:
                torch.autograd.backward([edge for edge, _ in edges], [gradient for _, gradient in edges], inputs=branch.weights)
        self.whole = []
        self.branches = []


class Unsplittable(Exception):
    """A block's backward cannot be taken in two halves; the message says why."""


def _branches(outputs: Sequence[Tensor], start: Tensor) -> list[_Branch]:
    """Find the nodes of the spine where weights branch off; `Unsplittable` where two of them share a weight."""
    spine, order = _spine([tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None], start)
    if any(tensor.grad_fn is None or not spine[tensor.grad_fn] for tensor in outputs):
        raise Unsplittable("an output does not depend on the input")
    owner: dict[int, Node] = {}
    branches = []
    for node in order:
        if not spine[node]:
            continue
        beside = [child for child, _ in node.next_functions if child is not None and not spine[child]]
        weights = {id(weight): weight for child in beside for weight in leaves_of(child)}
        for key in weights:
            if owner.setdefault(key, node) is not node:
                raise Unsplittable("a weight is used more than once")
        if weights:
            branches.append(_Branch(node, list(weights.values())))
    return branches


def _spine(roots: list[Node], start: Tensor) -> tuple[dict[Node, bool], list[Node]]:
    """Find whether the start can be reached from each node of the graph, and list the nodes, children first."""
    reaches: dict[Node, bool] = {}
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if expanded:
            if node not in reaches:
                own = getattr(node, "variable", None) is start
                reaches[node] = own or any(reaches[child] for child in children)
                order.append(node)
        elif node not in reaches:
            stack.append((node, True))
            stack += [(child, False) for child in children if child not in reaches]
    return reaches, order


def leaves_of(node: Node) -> list[Tensor]:
    """The leaves of autograd, such as weights, that a node leads to."""
    found, seen, stack = [], set[Node](), [node]
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            if hasattr(one, "variable"):
                found.append(one.variable)
            stack += [child for child, _ in one.next_functions if child is not None]
    return found


def why_whole(call: Callable[[Any], Any], parameters: Sequence[nn.Parameter], value: Any) -> str | None:
    """Find out on a value before a block why its backward has to stay whole; None where it can be split.

    Runs the block twice, takes one backward whole and the other in halves, and compares all gradients bit by bit. The
    gradients of `parameters` are None afterwards.
    """

    def forward() -> tuple[Roots, Tensor | None, list[Tensor | None]]:
        torch.manual_seed(0)
        entered, _, gradients = detached(copied(value))
        start = start_of(entered)
        outputs = [tensor for tensor in distinct_tensors(call(entered)) if tensor.requires_grad]
        torch.manual_seed(1)
        return [(tensor, torch.randn_like(tensor)) for tensor in outputs], start, gradients

    def taken() -> list[Tensor | None]:
        found = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return found

    taken()
    (whole, _, expected), (halved, start, got) = forward(), forward()
    torch.autograd.backward([tensor for tensor, _ in whole], [gradient for _, gradient in whole])
    expected += taken()
    try:
        halves = SplitBlock(start)
        halves.input_half(halved)
        early = start is not None and any(parameter.grad is not None for parameter in parameters)
        halves.weight_half()
    except Unsplittable as error:
        return str(error)
    except Exception as error:  # checkpoints that run a backward inside a backward, custom nodes that run once only
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    finally:
        got += taken()
    if early:
        return "the first half makes gradients of weights"
    for one, other in zip(got, expected, strict=True):
        if (one is None) != (other is None) or (one is not None and other is not None and not torch.equal(one, other)):
            return "the two halves give other gradients than the whole"
    return None
