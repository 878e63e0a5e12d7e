"""Losses between values inside the two models: which blocks' outputs they compare, how, and what is trained for that."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill.arguments import a_loss, hinted, one_of, raise_problems, real_number, shown
from pipestill.errors import ModelError, nearest
from pipestill.losses.counted import counts_of, with_sums
from pipestill.losses.signatures import LossValue, takes_target
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import describe, distinct_tensors
from pipestill.model.teachers import value_after

Select = str | int | Callable[[Any], Any] | None
"""Which tensor of a block's output is compared; see `features`."""

_HIDDEN = ("hidden", "hidden_states", "last_hidden_state")
"""Names under which blocks return their hidden states, tried in turn."""
_UNNAMED = "features"
"""The name of a term that has none of its own."""


@dataclass(frozen=True, eq=False)
class FeatureTerm:
    """One term of a loss between values inside the two models, as `features` makes it."""

    pairs: Mapping[str, str | Sequence[str]]
    loss: Callable[..., LossValue]
    project: bool | nn.Module | Sequence[nn.Module]
    weight: float
    of: Select
    seed: int = field(default_factory=lambda: int(torch.randint(2**62, ())))
    """Seeds the first weights of the projectors that the term makes; it follows `torch.manual_seed`, as a module's weights do."""

    def __post_init__(self) -> None:
        raise_problems(self._problems(), ModelError)

    def _problems(self) -> Iterator[str]:
        names = list(self.pairs) if isinstance(self.pairs, Mapping) else []
        if not names:
            yield f"features is of {shown(self.pairs)}; expected a dict of student blocks by teacher blocks"
        yield from a_loss("the loss of features", self.loss)
        yield from real_number("weight", self.weight, least=0)
        kinds = (bool, nn.Module, list, tuple)
        yield from one_of("project", self.project, kinds, "True, False, a module, or a list of modules, one for each pair")
        if self.of is not None and not callable(self.of):
            yield from one_of("of", self.of, (str, int), "a key or an index of a block's output, or a function of it")


@hinted
def features(
    pairs: Mapping[str, str | Sequence[str]],
    loss: Callable[..., LossValue],
    *,
    project: bool | nn.Module | Sequence[nn.Module] = False,
    weight: float = 1.0,
    of: Select = None,
) -> FeatureTerm:
    """Compare outputs of student blocks with outputs of teacher blocks: a term of the loss for `ps.Distillation(features=...)`.

    The blocks may be anywhere in the models, on any stage of a pipeline. Gradients enter the student at its block.

    Args:
        pairs: `{"teacher block": "student block"}`, each named as `[block.name for block in ps.BlockModel(model).blocks]` lists
            them; a list of student blocks compares each of these with the one teacher block.
        loss: `loss(student, teacher, target)` or `loss(student, teacher)` of the two blocks' values -> the mean over rows, as a
            scalar or as a dict of named scalars whose sum is the loss. A third argument without a default gets the targets.
            Where it is a module with parameters, these are trained with the student. It may count as any loss may (see
            `ps.losses.counted`). Those that ship: `ps.losses.Hint`, `AttentionTransfer`, `RKD`, `mse` and others of `ps.losses`.
        project: True gives each pair a trained map from the student's width to the teacher's: a linear map of the last axis, or
            for images, (rows, channels, height, width), a 1x1 convolution. Or the module to train, or a list of modules, one for
            each pair in order.
        weight: the factor of the term, at least 0.
        of: which tensor of a block's output is compared, where that is no single tensor: its key in a dict, its index in a tuple,
            or a function from the output to the tensor. Attention maps, say, where blocks return them. Default: the output
            itself, or the hidden states in it.

    Raises:
        ModelError: an argument is wrong.
    """
    return FeatureTerm(pairs, loss, project, weight, of)


class LinearMap(nn.Module):
    """A projector whose widths are those of the first values that it sees."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def fit(self, student: Tensor, teacher: Tensor) -> None:
        """Make the weights for values of these shapes, if there are none yet."""
        if self.weight is None:
            axis = 1 if student.dim() == 4 else -1
            self.make((teacher.shape[axis], student.shape[axis], *(1, 1)[: student.dim() // 4 * 2]), student.dtype)

    def make(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Draw the weights of a shape as torch's own layers do, from the projector's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            there, here = shape[:2]
            made = nn.Linear(here, there, dtype=dtype) if len(shape) == 2 else nn.Conv2d(here, there, 1, dtype=dtype)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, value: Tensor) -> Tensor:
        """Map the width of a value."""
        return F.linear(value, self.weight, self.bias) if self.weight.dim() == 2 else F.conv2d(value, self.weight, self.bias)


class Beside(NamedTuple):
    """A module with tensors of its own that is trained beside the student's blocks."""

    name: str
    """What stands before the names of its tensors, such as `loss` or `features.hint.projector`."""
    module: nn.Module
    block: int
    """The student's block on whose rank it is."""


class Tap(NamedTuple):
    """A tensor inside the teacher that some feature loss takes."""

    block: int
    of: Select


@dataclass(frozen=True, eq=False)
class Pair:
    """A student's block and a teacher's block whose outputs are compared."""

    name: str
    """The name of its part of the loss."""
    term: FeatureTerm
    student: int
    """The student's block."""
    tap: int
    """The number of the teacher's tensor."""
    projector: nn.Module | None
    where: str
    """The two blocks in words."""

    def parts(self, students: Sequence[Any], taught: Sequence[Tensor], target: Any) -> dict[str, Tensor]:
        """Compute the loss, of the values after the student's block and the teacher's tensors, joined if there are several."""
        selected = [select(self.term.of, value, f"{self.where}: the student's block") for value in students]
        student, teacher = (each[0] if len(each) == 1 else torch.cat(list(each)) for each in (selected, taught))
        if isinstance(self.projector, LinearMap):
            self.projector.fit(student, teacher)
        if self.projector is not None:
            student = self.projector(student)
        loss = self.term.loss
        value = with_sums(loss, student, teacher, target) if takes_target(loss) else loss(student, teacher)
        parts = {self.part(name): part for name, part in (value.items() if isinstance(value, Mapping) else [("loss", value)])}
        for name, part in parts.items():
            if not isinstance(part, Tensor) or part.dim() or part.is_complex():
                raise ModelError(f"the loss gave {shown(part)} as '{name}'; expected a scalar, or a dict of scalars that add up")
        return {name: part * self.term.weight for name, part in parts.items()}

    def part(self, name: str) -> str:
        """The name of a part of the loss in logs."""
        return self.name if name == "loss" else f"{self.name}.{name}"


@dataclass(frozen=True, eq=False)
class FeatureLosses:
    """All pairs of blocks that a task compares."""

    pairs: tuple[Pair, ...] = ()
    taps: tuple[Tap, ...] = ()
    """The teacher's tensors that are taken, each once."""
    beside: tuple[Beside, ...] = ()
    """Modules of the losses that are trained, or change."""

    @property
    def student_blocks(self) -> list[int]:
        """The student's blocks whose outputs are compared, in order."""
        return sorted({pair.student for pair in self.pairs})

    @property
    def teacher_blocks(self) -> list[int]:
        """The teacher's blocks whose outputs are compared, in order."""
        return sorted({tap.block for tap in self.taps})

    @property
    def block_pairs(self) -> tuple[tuple[int, int], ...]:
        """(student block, teacher block) of each pair."""
        return tuple((pair.student, self.taps[pair.tap].block) for pair in self.pairs)

    def taken(self, block: int, value: Any, copied: bool) -> dict[int, Tensor]:
        """The tensors that are taken of the value after a teacher's block, by tap; copies, where later blocks write to it."""
        value = value_after(value)
        taken = {n: select(tap.of, value, f"teacher block {block}") for n, tap in enumerate(self.taps) if tap.block == block}
        return {number: tensor.clone() if copied else tensor for number, tensor in taken.items()}

    def parts(
        self, block: int, students: Sequence[Any], taught: Sequence[Mapping[int, Tensor]], target: Any
    ) -> dict[str, Tensor]:
        """Compute the losses of a student's block. `students` and `taught`: its values and the teacher's tensors, by unit."""
        parts: dict[str, Tensor] = {}
        for pair in self.pairs:
            if pair.student == block:
                parts |= pair.parts(students, [tensors[pair.tap] for tensors in taught], target)
        return parts

    def counts(self, target: Any) -> dict[str, float]:
        """Count how much of a batch some targets are, by part; parts without a count are means over rows."""
        found = ((pair, counts_of(pair.term.loss, target)) for pair in self.pairs if takes_target(pair.term.loss))
        return {pair.part(name): count for pair, counts in found for name, count in counts.items()}


def select(of: Select, value: Any, where: str) -> Tensor:
    """The tensor of a block's output that is compared; `ModelError` where the output has none of that name."""
    if callable(of):
        found = of(value)
    elif of is not None:
        try:
            if isinstance(value, Tensor):
                raise KeyError(of)  # which would be taken for rows
            found = value[of]
        except (KeyError, IndexError, TypeError):
            raise ModelError(
                f"{where} gives {describe(value)}, which has no {of!r}; attention maps and the like can be compared only where "
                "the blocks return them (eager attention); name another part of the output as `of`, or give a function"
            ) from None
    else:
        found = value
        if not isinstance(value, Tensor):
            named = [value[name] for name in _HIDDEN if isinstance(value, Mapping) and name in value]
            floating = [tensor for tensor in distinct_tensors(value) if tensor.is_floating_point()]
            found = named[0] if named else floating[0] if len(floating) == 1 else None
    if not isinstance(found, Tensor) or not found.is_floating_point() or not found.dim():
        raise ModelError(
            f"{where} gives {describe(value)}, of which {'this' if of is None else repr(of)} is no tensor to compare; say which "
            "one it is as `of`: a key, an index, or a function of the output"
        )
    return found


def resolve(given: Any, student: BlockModel, teacher: BlockModel) -> FeatureLosses:
    """Find the blocks that the terms name; `ModelError` for a block that there is not, or modules that cannot be trained.

    `given`: one term, a dict of terms by name, a list of them, or None.
    """
    pairs: list[Pair] = []
    taps: dict[Tap, int] = {}
    beside: list[Beside] = []
    for name, term in _named_terms(given).items():
        wanted = [
            (theirs, mine)
            for theirs, of_student in term.pairs.items()
            for mine in ([of_student] if isinstance(of_student, str) else of_student)
        ]
        projectors = _projectors(name, term, len(wanted))
        blocks = set[int]()
        for (theirs, mine), projector in zip(wanted, projectors, strict=True):
            tap = Tap(_block("teacher", teacher, theirs), term.of)
            block = _block("student", student, mine)
            blocks.add(block)
            part = _part_name(name, theirs, mine, [of_pair for _, of_pair in wanted])
            where = f"features '{name}', teacher block '{theirs}' and student block '{mine}'"
            pairs.append(Pair(part, term, block, taps.setdefault(tap, len(taps)), projector, where))
            if projector is not None:
                beside.append(Beside(f"{_prefix(name, part)}.projector", projector, block))
        if isinstance(term.loss, nn.Module) and term.loss.state_dict():
            if len(blocks) > 1:
                raise ModelError(
                    f"the loss of features '{name}' has tensors of its own, and compares {len(blocks)} blocks of the student, "
                    "which may be on different devices; give each a term with a loss of its own"
                )
            beside.append(Beside(f"{_prefix(name, name)}.loss", term.loss, blocks.pop()))
    names = [pair.name for pair in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"features have the same two blocks twice in one term: {', '.join(twice)}; give each a term of its own")
    return FeatureLosses(tuple(pairs), tuple(taps), tuple(beside))


def _named_terms(given: Any) -> dict[str, FeatureTerm]:
    """The terms by name."""
    if given is None:
        return {}
    if isinstance(given, FeatureTerm):
        given = {_UNNAMED: given}
    elif isinstance(given, (list, tuple)):
        given = {f"features_{number}": term for number, term in enumerate(given)}
    if not isinstance(given, Mapping):
        raise ModelError(f"features is {shown(given)}; expected ps.features(...), a list of them, or a dict of them by name")
    problems = [p for name, term in given.items() for p in one_of(f"features {name!r}", term, FeatureTerm, "ps.features(...)")]
    strange = [name for name in given if not str(name).isidentifier()]
    problems += [f"a term of features is named {name!r}; expected letters, digits and _" for name in strange]
    raise_problems(problems, ModelError)
    return dict(given)


def _part_name(term: str, theirs: str, mine: str, students: Sequence[str]) -> str:
    """The name of a pair's part of the loss: the term's, with the student's block where the term has several pairs."""
    if len(students) == 1:
        return term
    return f"{term}.{mine}" if students.count(mine) == 1 else f"{term}.{theirs}.{mine}"


def _prefix(term: str, part: str) -> str:
    """What stands before the names of a module's tensors; a term without a name of its own is called `features` anyway."""
    return part if term == _UNNAMED else f"{_UNNAMED}.{part}"


def _projectors(name: str, term: FeatureTerm, count: int) -> list[nn.Module | None]:
    """The projector of each pair of a term."""
    project = term.project
    if isinstance(project, bool):
        return [LinearMap(term.seed + number) if project else None for number in range(count)]
    given = [project] if isinstance(project, nn.Module) else list(project)
    if len(given) != count or not all(isinstance(module, nn.Module) for module in given):
        raise ModelError(
            f"features '{name}' has {count} pairs and {len(given)} projectors; expected True, or one module for each"
        )
    return list(given)


def _block(role: str, model: BlockModel, name: str) -> int:
    """The number of a block; `ModelError` where a model has none or several of that name."""
    names = [block.name for block in model.blocks]
    if names.count(name) != 1:
        how = "no block" if name not in names else f"{names.count(name)} blocks"
        raise ModelError(f"features: the {role} has {how} '{name}'{nearest(str(name), names)}; its blocks are {', '.join(names)}")
    return names.index(name)
