"""Checks that a model's blocks, one after the other, are the model: they compute what its forward does, and train what it has."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import copied, describe
from pipestill.model.stepwise import untouched
from pipestill.model.tasks import Task


def check_chain(task: Task, role: str, model: BlockModel, inputs: Any) -> None:
    """Refuse blocks that, called one after the other, do not compute what the model's own forward computes.

    The two are compared in eval mode. The forward gets the inputs as keywords where they are a dict of its arguments, else as
    one value. Of outputs that are dicts, the entries that both have are compared (`logits`, say). A model whose forward takes
    other arguments, or whose blocks return something else each time, cannot be compared and is taken to be what its blocks say.
    """
    by_keywords = isinstance(inputs, Mapping) and _binds(model.model, (), inputs)
    if not by_keywords and not _binds(model.model, (inputs,), {}):
        return
    chain, again = (_evaluated(task, model, model, inputs) for _ in range(2))
    try:
        with _without_cache(model.model):
            whole = _evaluated(task, model, lambda given: model.model(**given) if by_keywords else model.model(given), inputs)
    except Exception as error:
        if by_keywords and not isinstance(error, NotImplementedError):
            raise ModelError(
                f"the {role}'s blocks take {describe(inputs)}, but {type(model.model).__name__}.forward, whose work they should "
                f"do, does not: {type(error).__name__}: {error}"
            ) from error
        return  # it takes another kind of value: there is nothing to compare with
    if _alike(chain, again) and _alike(chain, whole) is False:
        raise ModelError(
            f"the {role}'s blocks ({', '.join(block.name for block in model.blocks)}), one after the other, do not "
            f"give what {type(model.model).__name__}.forward gives; put what only its forward does into a block"
        )


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Run the body with a model of `transformers` as training runs it: with a cache, it takes packed sequences for one."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def _binds(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's forward takes arguments of this number and these names."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _evaluated(task: Task, model: BlockModel, call: Callable[[Any], Any], inputs: Any) -> Any:
    """Call the blocks or the whole model on a copy of the inputs, in eval mode and from the same random state."""
    with untouched(task), torch.no_grad():
        model.model.eval()
        torch.manual_seed(0)
        return call(copied(inputs))


def _alike(one: Any, other: Any) -> bool | None:
    """Whether the tensors of two nests are equal up to rounding; None when the nests have no structure in common."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        both = [name for name in one if isinstance(one[name], Tensor) and isinstance(other.get(name), Tensor)]
        if both:
            one, other = ({name: value[name] for name in both} for value in (one, other))
    elif isinstance(one, Tensor) and isinstance(other, Mapping) and isinstance(other.get("logits"), Tensor):
        other = other["logits"]
    (ours, spec), (theirs, their_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if spec != their_spec:
        return None
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs
    )


class TrainedWatch:
    """Watches which parameters of a student get gradients, as the pieces of steps end."""

    def __init__(self, model: BlockModel) -> None:
        self.model = model
        self.trained: set[str] = set()

    def done(self, what: str, block: int) -> None:
        """Refuse a block that trains a parameter without naming it in its `uses`; called as each piece of a step ends.

        In a pipeline such a parameter could lie in another stage, where the block would train a copy of it. The gradients
        that the block's backward has left are looked at, then removed.
        """
        if what != "backward":
            return
        own = {id(p) for p in self.model.parameters_of(range(block, block + 1)).values()}
        trained = [(name, p) for name, p in self.model.model.named_parameters() if p.grad is not None]
        others = [name for name, p in trained if id(p) not in own]
        if others:
            raise ModelError(
                f"student block {block} ('{self.model.blocks[block].name}') trains {_listed(others)} "
                "without naming them in its `uses`; name them there"
            )
        sparse = [name for name, p in trained if p.grad is not None and p.grad.layout is not torch.strided]
        if sparse:
            raise ModelError(
                f"student block {block} ('{self.model.blocks[block].name}') makes sparse gradients of {_listed(sparse)}, and "
                "only dense ones can be added up, clipped and logged; use nn.Embedding(..., sparse=False) and a dense optimizer"
            )
        self.trained |= {name for name, _ in trained}
        self.model.model.zero_grad()

    def warn_of_untrained(self) -> None:
        """Warn of parameters that got no gradient: a block may have left them out."""
        left = [n for n, p in self.model.model.named_parameters() if p.requires_grad and n not in self.trained]
        if left:
            warnings.warn(
                f"the student's {_listed(left)} got no gradient on the sample batch, so nothing trains "
                f"{'them' if len(left) > 1 else 'it'}; if blocks should use {'them' if len(left) > 1 else 'it'}, mend the cuts, "
                "else freeze what is not to be trained (requires_grad_(False))",
                stacklevel=2,
            )


def _listed(names: list[str]) -> str:
    """Names for a message, the first few of them."""
    return f"{', '.join(map(repr, names[:5]))}{' and more' if len(names) > 5 else ''}"
