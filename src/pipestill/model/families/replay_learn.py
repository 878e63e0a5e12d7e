"""Looks at a model before it is cut: what travels between its blocks, which block owns what, and whether they do what it does."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.families.replay_check import quietly, verify
from pipestill.model.families.replay_model import ReplayedModel
from pipestill.model.families.replay_run import Arrived, Facts, Stop
from pipestill.model.families.replay_samples import padded_samples
from pipestill.model.families.replay_trace import Lookout, Trace, crossings_of, module_owners, owners_of

_ELSEWHERE = "encoder_"
"""Entries of an output with such names are left out where another stage has them."""


def learn(replayed: ReplayedModel, inputs: Mapping[str, Any]) -> Facts:
    """Find out what travels for inputs of these names, and verify the blocks; `ModelError` where the model cannot be cut."""
    samples = {what: replayed.beside_weights(sample) for what, sample in padded_samples(inputs, replayed.config).items()}
    sample = samples.get("padded right") or next(iter(samples.values()))
    with quietly(replayed.model):
        trace = Trace.of(replayed.model, replayed.layout)
        with trace.marks:
            output = replayed.replay(replayed.blocks, sample, Arrived((), None), _nothing, None, trace)
            trace.end()
        _take_owners(replayed, trace, inputs)
        floats = {n: v.dtype for n, v in sample.items() if isinstance(v, Tensor) and v.is_floating_point()}
        everything = Facts(crossings_of(trace, [set(sample) for _ in replayed.blocks]), floats, _names(output))
        facts = _look_back(replayed, sample, everything, trace)
        _verify(replayed, samples, facts)
    return facts


def _nothing(block: int) -> None:
    """Do nothing before a block."""


def _take_owners(replayed: ReplayedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
    """Note which block owns what; for later inputs it must be the same."""
    owners = owners_of(replayed.model, replayed.layout, trace.used)
    if not replayed.outlines:
        replayed.outlines = tuple(trace.outlines)
        replayed.parameter_owners = owners
        replayed.owners = module_owners(replayed.model, replayed.layout, owners)
        return
    read = {name for seen in trace.used.values() for name in seen} & owners.keys()
    if any(not owners[name] <= replayed.parameter_owners[name] for name in read):
        raise ModelError(
            f"{type(replayed.model).__name__} reads weights in other blocks where its inputs are {', '.join(inputs)}; "
            "pass cuts=ps.cut_by_replay(model, inputs) with such inputs"
        )


def _names(output: Any) -> tuple[str, ...] | None:
    """The entries of an output that hold something."""
    return tuple(n for n, v in output.items() if v is not None) if isinstance(output, Mapping) else None


def _look_back(replayed: ReplayedModel, sample: dict[str, Any], facts: Facts, trace: Trace) -> Facts:
    """Run every block alone, and refuse those that pass on what depends on other blocks. Returns what has to travel at least."""
    needed: list[set[str]] = []
    value: Any = sample
    for block in replayed.blocks:
        own = {name for name, blocks in replayed.parameter_owners.items() if block in blocks}
        lookout = Lookout.of(replayed.model, own, {name: sample[name] for name in facts.floats})
        arrived = replayed.arrived(value, facts.crossings[block - 1]) if block else Arrived((), None)
        with lookout.marks:
            result = replayed.replay(range(block, block + 1), sample, arrived, _nothing, facts, lookout)
        if isinstance(result, Stop):
            value = replayed.travelling(block + 1, sample, result, facts)
            sent = [value["hidden"], *value["more"]]
        else:
            facts = replace(facts, outputs=_kept(result, lookout))
            sent = _tensors(facts.outputs_of(result))
        if any(map(lookout.from_elsewhere, sent)):
            raise ModelError(
                f"{type(replayed.model).__name__} cannot be cut at '{replayed.layout.block_names[block]}': what it passes on "
                "depends on weights or values of other blocks, which its layer's arguments do not hold; pass cuts of your own"
            )
        needed.append(lookout.inputs_of(sent))
    return replace(facts, crossings=crossings_of(trace, needed))


def _kept(output: Any, lookout: Lookout) -> tuple[str, ...] | None:
    """The entries of the output that the last block has; those of an encoder may be left to another stage."""
    names = _names(output)
    if names is None:
        return None

    def elsewhere(name: str) -> bool:
        return name.startswith(_ELSEWHERE) and any(map(lookout.from_elsewhere, _tensors(output[name])))

    return tuple(name for name in names if not elsewhere(name))


def _tensors(nest: Any) -> list[Tensor]:
    """The tensors of a nest."""
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]


def _verify(replayed: ReplayedModel, samples: Mapping[str, dict[str, Any]], facts: Facts) -> None:
    """Compare the blocks, one after the other, with the model's own forward."""

    def whole(sample: dict[str, Any]) -> Any:
        return facts.outputs_of(replayed.model(**replayed.arguments(sample)))

    def through(block: int, value: Any) -> Any:
        arrived = replayed.arrived(value, facts.crossings[block - 1]) if block else Arrived((), None)
        inputs = value["inputs"] if block else value
        result = replayed.replay(range(block, block + 1), inputs, arrived, _nothing, facts)
        return replayed.travelling(block + 1, inputs, result, facts) if isinstance(result, Stop) else facts.outputs_of(result)

    verify(replayed.model, replayed.layout, samples, whole, through, [crossing.leaves[0] for crossing in facts.crossings])
