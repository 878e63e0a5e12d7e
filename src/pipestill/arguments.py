"""Whether what a user gave is of the kind that was asked for: each function gives the problems that it finds, as text."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from types import NoneType
from typing import Any, TypeVar, cast

from pipestill.errors import ConfigError, UnknownArgument, nearest


def raise_problems(problems: Iterable[str], error: type[Exception] = ConfigError) -> None:
    """All of them at once, where there are any."""
    found = list(problems)
    if found:
        raise error("; ".join(found))


def shown(value: object) -> str:
    """In a message, on one line: an optimizer or a model tells a page about itself."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(name: str, value: object, least: int | None = None) -> Iterator[str]:
    """`value` is no whole number, or less than `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        yield f"{name} is {shown(value)}; expected a whole number"
    elif least is not None and value < least:
        yield f"{name} is {value}; expected at least {least}"


def real_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Iterator[str]:
    """`value` is no finite number, is less than `least`, is not above `above`, or is more than `most`."""
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
    """`value` is of none of `kinds`; `expected` says what to give."""
    if not isinstance(value, kinds):
        yield f"{name} is {shown(value)}; expected {expected}"


def function(name: str, value: object, expected: str) -> Iterator[str]:
    """`value` cannot be called; `expected` says what to give."""
    if not callable(value):
        yield f"{name} is {shown(value)}; expected {expected}"


def a_loss(name: str, value: object) -> Iterator[str]:
    """`value` is no function, or a class whose objects are."""
    if isinstance(value, type):
        yield f"{name} is the class {value.__name__}; expected an object of it: {value.__name__}(...)"
    yield from function(name, value, "a function")


def listeners(value: object) -> Iterator[str]:
    """`value` is no sequence of objects that hear of a run."""
    heard = ("start", "step", "validation", "end")
    if not isinstance(value, (list, tuple)):
        yield f"callbacks is {shown(value)}; expected a list of callbacks"
        return
    for one in value:
        missing = [name for name in heard if not callable(getattr(one, name, None))]
        if missing or isinstance(one, type):
            yield f"callback {shown(one)} is no object with the methods {', '.join(heard)}; derive it from callbacks.Callback"


def check_extent(epochs: object, steps: object) -> None:
    """`ConfigError` for numbers of epochs and steps that cannot be; None is no limit."""
    given = {"epochs": epochs, "steps": steps}
    raise_problems(p for name, value in given.items() if value is not None for p in whole(name, value, 1))


def metric_problems(metrics: object) -> Iterator[str]:
    """`metrics` is no dict of functions by name, or one has the name of what is told anyway."""
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
    """What is wrong with an optimizer and its settings before one is made."""
    expected = (
        "a class such as torch.optim.SGD, or a function, that makes one from parameters: there is one for each stage"
    )
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
    """The schedule (default: 1 at any step), whose factors are looked at; `ConfigError` for one that cannot be."""

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
    """What a function of the step does wrong at the first one."""
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
    """An amount of memory, as messages show it."""
    return f"{num_bytes / 2**20:.6g} MiB"


# ---------------------------------------------------------------- names of arguments that other libraries have

_FIT = "an argument of `fit`: trainer.fit(loader, {})"
_OPTION = "an option of the optimizer: optimizer_options={{{}}}"
_HINTS = {
    **dict.fromkeys(("learning_rate", "base_lr"), "called `lr` here"),
    **dict.fromkeys(("max_epochs", "num_epochs", "num_train_epochs", "n_epochs"), _FIT.format("epochs=...")),
    **dict.fromkeys(("max_steps", "num_steps"), _FIT.format("steps=...")),
    **dict.fromkeys(
        ("val_dataloaders", "val_loader", "eval_dataset", "valid_loader", "validation_loader", "validation_data"),
        _FIT.format("validate=...").replace("an argument", "`validate`, an argument"),
    ),
    **dict.fromkeys(
        ("train_dataloaders", "train_loader", "train_dataset", "dataloader"), "the first argument of `fit`"
    ),
    **dict.fromkeys(("epochs", "steps", "validate"), "an argument of `fit`"),
    **dict.fromkeys(
        ("max_grad_norm", "grad_clip", "gradient_clip_val", "clip_grad", "max_norm"), "called `clip_grad_norm` here"
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulate_grad_batches", "num_microbatches", "micro_batches", "chunks"),
        "called `microbatches` here: slices of a batch whose gradients add up",
    ),
    **dict.fromkeys(
        ("batch_size", "per_device_train_batch_size", "micro_batch_size"),
        "the loader's: DataLoader(..., batch_size=...); `microbatches` says how many slices a batch is cut into",
    ),
    **dict.fromkeys(
        ("device_ids", "num_devices", "gpus", "num_gpus", "world_size"), "called `devices` here: their number"
    ),
    **dict.fromkeys(("accelerator", "device_type"), "called `device` here: 'cpu' or 'cuda'"),
    "profile": "called `costs` here: costs=BlockProfile.load(...)",
    **dict.fromkeys(
        ("memory_bytes", "max_memory", "memory_limit"), "called `memory` here: bytes, or text such as '80GB'"
    ),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule"), "called `lr_schedule` here"),
    **dict.fromkeys(
        ("optim", "optimizers", "optimizer_class"), "called `optimizer` here: a class such as torch.optim.SGD"
    ),
    **dict.fromkeys(("optimizer_kwargs", "optimizer_args", "optim_args"), "called `optimizer_options` here"),
    **{name: _OPTION.format(f"'{name}': ...") for name in ("weight_decay", "momentum", "betas", "eps", "nesterov")},
    **dict.fromkeys(("logging_steps", "log_every_n_steps", "log_interval"), "called `log_every` here"),
    "timeout": "called `timeout_seconds` here",
    "num_stages": "called `devices` here: there is one stage on each",
    **dict.fromkeys(("partition", "balance"), "called `student_partition` here (and `teacher_partition`)"),
    "spare_ranks": "gone: give `fit` a world instead",
    "teacher_model": "called `teacher` here",
    **dict.fromkeys(("student_model", "model"), "called `student` here"),
    "adapters": "called `output_projectors` here",
    "input_adapters": "called `input_projectors` here",
    **dict.fromkeys(("criterion", "loss_fn", "loss_function", "objective"), "called `loss` here"),
    **dict.fromkeys(
        ("temperature", "alpha"), "the loss's: for example loss=ps.losses.SoftTarget(temperature=4.0, weight=0.1)"
    ),
    **dict.fromkeys(("ema", "ema_decay", "tau", "decay", "moving_average_decay"), "called `momentum` here"),
    **dict.fromkeys(("cuts", "split_points"), "called `student_cuts` here (and `teacher_cuts`)"),
    **dict.fromkeys(
        ("precision", "fp16", "bf16", "amp"), "not an argument here: call `fit` inside torch.autocast, with bfloat16"
    ),
}
"""What users of other libraries write, and what to write instead."""

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
    """What to write in place of an unknown argument: what it is called here, the closest name, or one of all."""
    hint = _HINTS.get(name, "")
    called = re.search("called `([a-z_]+)`", hint)
    if hint and (called is None or called[1] in known):
        return f"; it is {hint}"
    return nearest(name, known) or f"; there are {', '.join(known)}"
