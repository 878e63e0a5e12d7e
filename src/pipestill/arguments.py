"""Checks of what users give: most functions yield the problems that they find, as text."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from types import NoneType
from typing import Any, TypeVar, cast

from pipestill.errors import ConfigError, UnknownArgument, nearest


def raise_problems(problems: Iterable[str], error: type[Exception] = ConfigError) -> None:
    """Raise one error that lists all problems; do nothing where there are none."""
    found = list(problems)
    if found:
        raise error("; ".join(found))


def shown(value: object) -> str:
    """Describe a value for a message on one short line: the text of an optimizer or a model fills a page."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(name: str, value: object, least: int | None = None) -> Iterator[str]:
    """Yield a problem where `value` is no whole number, or is less than `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        yield f"{name} is {shown(value)}; expected a whole number"
    elif least is not None and value < least:
        yield f"{name} is {value}; expected at least {least}"


def real_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Iterator[str]:
    """Yield a problem where `value` is no finite number, is less than `least`, not above `above`, or more than `most`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        yield f"{name} is {shown(value)}; expected a number"
    elif not math.isfinite(value):
        yield f"{name} is {value}; expected a finite number"
    elif least is not None and value < least:
        yield f"{name} is {value}; expected {least:g} or more"
    elif above is not None and value <= above:
        yield f"{name} is {value}; expected more than {above:g}"
    elif most is not None and value > most:
        yield f"{name} is {value}; expected {most:g} or less"


def one_of(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> Iterator[str]:
    """Yield a problem where `value` is of none of `kinds`; `expected` says what to give."""
    if not isinstance(value, kinds):
        yield f"{name} is {shown(value)}; expected {expected}"


def function(name: str, value: object, expected: str) -> Iterator[str]:
    """Yield a problem where `value` cannot be called; `expected` says what to give."""
    if not callable(value):
        yield f"{name} is {shown(value)}; expected {expected}"


def a_loss(name: str, value: object) -> Iterator[str]:
    """Yield a problem where `value` is no function; a class is none, but its objects may be."""
    if isinstance(value, type):
        yield f"{name} is the class {value.__name__}; expected an object of it: {value.__name__}(...)"
    yield from function(name, value, "a function")


def listeners(value: object) -> Iterator[str]:
    """Yield a problem for everything in `value` that has not the methods of a callback."""
    methods = ("start", "step", "validation", "end")
    if not isinstance(value, (list, tuple)):
        yield f"callbacks is {shown(value)}; expected a list of callbacks"
        return
    for one in value:
        missing = [name for name in methods if not callable(getattr(one, name, None))]
        if missing or isinstance(one, type):
            yield f"callback {shown(one)} is no object with the methods {', '.join(methods)}; derive it from callbacks.Callback"


def check_extent(epochs: object, steps: object) -> None:
    """Raise `ConfigError` where a number of epochs or steps is no whole number above 0; None is no limit."""
    given = {"epochs": epochs, "steps": steps}
    raise_problems(p for name, value in given.items() if value is not None for p in whole(name, value, 1))


def metric_problems(metrics: object) -> Iterator[str]:
    """Yield a problem where `metrics` is no dict of functions by name, or a name is that of the training loss."""
    if not isinstance(metrics, (Mapping, NoneType)):
        yield f"metrics is {shown(metrics)}; expected a dict of functions (output, target) by name"
        return
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or name == "loss":
            yield f"a metric is named {name!r}; expected another name, as text ('loss' is the training's)"
        yield from function(f"metric {name!r}", metric, "a function of (output, target)")


def optimizing(
    optimizer: object, lr: object, options: object, param_groups: object, schedules: Mapping[str, object]
) -> Iterator[str]:
    """Yield the problems of an optimizer's class and settings that can be seen before one is made."""
    expected = "a class such as torch.optim.SGD, or a function, that makes one from parameters: there is one for each stage"
    yield from function("optimizer", optimizer, expected)
    if callable(lr):
        yield f"lr is {shown(lr)}; expected a number, on which lr_schedule(step) is a factor"
    else:
        yield from real_number("lr", lr, least=0)
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options)):
        yield f"optimizer_options is {shown(options)}; expected a dict of the optimizer's own options"
    elif isinstance(options, Mapping) and "lr" in options:
        yield "optimizer_options has a learning rate; give it as lr"
    if param_groups is not None:
        yield from function("param_groups", param_groups, "a function from {name: parameter} to a list of groups")
    for name, schedule in schedules.items():
        if schedule is not None:
            yield from function(name, schedule, "a function from the step (from 0) to a factor")


def checked_factor(name: str, schedule: Callable[[int], Any] | None) -> Callable[[int], float]:
    """The schedule (default: always 1), which raises `ConfigError` where a factor is no finite number of at least 0."""

    def factor(step: int) -> float:
        value = 1.0 if schedule is None else schedule(step)
        try:
            result = value if isinstance(value, (int, float)) else float(value + 0)  # text has no sum with a number
        except (TypeError, ValueError, RuntimeError):
            result = math.nan
        if not (math.isfinite(result) and result >= 0):
            raise ConfigError(f"{name}({step}) is {shown(value)}; expected a finite number, 0 or more")
        return result

    return factor


def try_first(name: str, schedule: Callable[[int], object]) -> Iterator[str]:
    """Yield a problem where a function of the step fails at the first step."""
    try:
        schedule(0)
    except ConfigError as error:
        yield str(error)
    except Exception as error:
        yield f"{name}(0) failed: {type(error).__name__}: {error}; expected a function from the step (from 0)"


_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


def parse_bytes(amount: object) -> int:
    """Read an amount of memory: a number of bytes, or text such as "80GB" or "512MiB".

    Units are powers of 1000 (KB, MB, GB, TB) or of 1024 (KiB, MiB, GiB, TiB), in any case. `ConfigError` for anything else,
    and for no memory at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", str(amount).lower())
    if isinstance(amount, bool) or not found or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f"expected memory such as 80GB or 512MiB, got {amount!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def mebibytes(num_bytes: float) -> str:
    """Write an amount of memory as messages show it."""
    return f"{num_bytes / 2**20:.6g} MiB"


# ---------------------------------------------------------------- names of arguments that other libraries have

_FAMILIAR = """
learning_rate base_lr: called `lr` here
max_epochs num_epochs num_train_epochs n_epochs epochs: an argument of `fit`: trainer.fit(loader, epochs=...)
max_steps num_steps steps: an argument of `fit`: trainer.fit(loader, steps=...)
val_dataloaders val_loader eval_dataset valid_loader validation_loader validation_data: called `validate` here, an argument of fit
train_dataloaders train_loader train_dataset dataloader: the first argument of `fit`
validate: an argument of `fit`: trainer.fit(loader, validate=...)
max_grad_norm grad_clip gradient_clip_val clip_grad max_norm: called `clip_grad_norm` here
gradient_accumulation_steps accumulate_grad_batches num_microbatches micro_batches chunks: called `microbatches` here
batch_size per_device_train_batch_size micro_batch_size: the loader's: DataLoader(..., batch_size=...)
device_ids num_devices gpus num_gpus world_size: called `devices` here: their number
accelerator device_type: called `device` here: 'cpu' or 'cuda'
profile: called `costs` here: costs=BlockProfile.load(...)
memory_bytes max_memory memory_limit: called `memory` here: bytes, or text such as '80GB'
scheduler lr_scheduler schedule: called `lr_schedule` here
optim optimizers optimizer_class: called `optimizer` here: a class such as torch.optim.SGD
optimizer_kwargs optimizer_args optim_args: called `optimizer_options` here
weight_decay momentum betas eps nesterov: an option of the optimizer: optimizer_options={"NAME": ...}
logging_steps log_every_n_steps log_interval: called `log_every` here
timeout: called `timeout_seconds` here
num_stages: called `devices` here: there is one stage on each
partition balance: called `student_partition` here (and `teacher_partition`)
spare_ranks: gone: give `fit` a world instead
teacher_model: called `teacher` here
student_model model: called `student` here
adapters: called `output_projectors` here
input_adapters: called `input_projectors` here
criterion loss_fn loss_function objective: called `loss` here
temperature alpha: the loss's: for example loss=ps.losses.SoftTarget(temperature=4.0, weight=0.1)
ema ema_decay tau decay moving_average_decay: called `momentum` here
cuts split_points: called `student_cuts` here (and `teacher_cuts`)
T temp tau kd_temperature softmax_temperature student_temp: called `temperature` here
alpha lambda_kd kd_alpha kd_lambda soft_weight: called `kd_ratio` here (the cross entropy weighs the rest), or `weight`
alpha lambda_kd kd_weight distill_weight coefficient factor: called `weight` here
ce_weight hard_weight label_weight: called `cross_entropy` here: the factor of the cross entropy with the labels
topk top_k num_classes_kept: called `k` here
ignore_id ignore_label label_pad_token_id: called `ignore_index` here
vocab_size num_words: called `vocabulary` here: how many logits of each model are compared
precision fp16 bf16 amp: no argument: call `fit` inside torch.autocast, with bfloat16
"""
"""Names of arguments that users of other libraries write, and what to write instead."""

_HINTS: dict[str, list[str]] = {}
for _names, _, _hint in (line.partition(": ") for line in _FAMILIAR.strip().splitlines()):
    for _name in _names.split():
        _HINTS.setdefault(_name, []).append(_hint)

F = TypeVar("F", bound=Callable[..., Any])


def hinted(called: F) -> F:
    """Make a function or class refuse an argument that it does not have by an `UnknownArgument` that names the right one."""
    function = called.__init__ if isinstance(called, type) else called  # type: ignore[misc]
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    what = called.__name__

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        problems = [f"{what} has no argument '{name}'{_instead(name, known)}" for name in kwargs if name not in known]
        raise_problems(problems, UnknownArgument)
        return function(*args, **kwargs)

    if isinstance(called, type):
        called.__init__ = checked  # type: ignore[misc]
        return called
    return cast(F, checked)


def _instead(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown argument: what to write instead, the closest name, or all names."""
    hints = [(hint.replace("NAME", name), re.search("called `([a-z_]+)`", hint)) for hint in _HINTS.get(name, ())]
    for hint, called in sorted(hints, key=lambda pair: pair[1] is None):  # those that name an argument of this function first
        if (of_fit := re.search(r"an argument of `fit`: .*, (\w+)=", hint)) and of_fit[1] in known:  # this is `fit`
            return f"; it is called `{of_fit[1]}` here"
        if called is None or called[1] in known:
            return f"; it is {hint}"
    return nearest(name, known) or f"; there are {', '.join(known)}"
