"""Command lines and YAML files -> typed dataclasses, through jsonargparse."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from pipestill.arguments import raise_problems, real_number, whole
from pipestill.cli.commands import COMMANDS
from pipestill.cli.parser import FromFile, Parser
from pipestill.errors import ConfigError, nearest
from pipestill.recipes import RECIPES, find
from pipestill.recipes.run_options import Numbers, NumBytes

if TYPE_CHECKING:
    from pipestill.recipes.recipe import Recipe


_VALUES = {int: "N", float: "X", str: "TEXT", Numbers: "N,N", NumBytes: "SIZE"}


def _hints(groups: Sequence[type]) -> dict[str, Any]:
    """The type of every key."""
    fields = {f.name for group in groups for f in dataclasses.fields(group)}
    return {name: hint for group in groups for name, hint in get_type_hints(group).items() if name in fields}


def _help(command: str, groups: Sequence[type], defaults: Mapping[str, Any]) -> str:
    """The help of a command: what each key means and its usual value, from the docstrings of the dataclasses."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = textwrap.wrap(f"usage: pipestill {command} [--KEY VALUE ...]", width, subsequent_indent="  ")
    lines += ["", *_about(command, width)]
    for group in groups:
        about = inspect.cleandoc(group.__doc__ or "").partition("Args:")[0]
        summary, *more = (" ".join(paragraph.split()) for paragraph in about.strip().split("\n\n"))
        for paragraph in [summary, *more] if hasattr(group, "name") else []:
            lines += ["", *textwrap.wrap(paragraph, width)]
        heading = "The recipe's own keys" if hasattr(group, "name") else summary.rstrip(".")
        lines += ["", f"{heading}:"]
        meanings = meanings_of(group)
        hints = _hints([group])
        for field in _own_first(group):
            if len(groups) > 1 and meanings[field.name].startswith("without a recipe"):
                continue  # here is one
            usual = defaults.get(field.name, field.default)
            key = f"  --{field.name} {_shown_values(hints[field.name], usual)}".rstrip()
            lines += _entry(key, meanings[field.name] + _shown_default(group, field.name, usual, meanings), width)
    lines += ["", "Always there:"]
    lines += _entry("  --print_config", "print all keys with their values as YAML, and do nothing else", width)
    lines += _entry("  -h, --help", "print this help", width)
    return "\n".join(lines)


def _about(command: str, width: int) -> list[str]:
    """What a command does, as lines of a sentence."""
    summary = COMMANDS[command.split()[0]]
    return textwrap.wrap(f"{summary[0].upper()}{summary[1:]}.", width)


def _own_first(group: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass: its own, then those of the classes that it derives from, the nearest first."""
    own = [inspect.get_annotations(one) for one in group.__mro__]
    return sorted(dataclasses.fields(group), key=lambda field: [field.name in names for names in own].index(True))


def meanings_of(group: type) -> dict[str, str]:
    """What each field of a dataclass means, from its docstring and those of the classes that it derives from."""
    meanings: dict[str, str] = {}
    for one in reversed(group.__mro__):
        described = inspect.cleandoc(one.__doc__ or "").partition("Args:")[2]
        meanings |= re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE)
    return meanings


def _shown_values(hint: Any, usual: Any) -> str:
    """The values that a key takes, in short."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if kinds == [bool]:
        return "true|false" if usual is True else ""
    return "|".join(map(str, kinds)) if get_origin(hint) is Literal else _VALUES[kinds[0]]


def _shown_default(group: type, name: str, usual: Any, meanings: Mapping[str, str]) -> str:
    """The usual value of a key: its own, or that of the usual preset."""
    if "(default" in meanings[name] or usual is False:
        return ""
    preset = ""
    if usual is None and "preset" in meanings:
        instance: Any = group()
        usual, preset = getattr(instance, name), f" in preset {instance.preset}"
    if usual is None or usual is False or usual == ():
        return ""
    shown = ",".join(map(str, usual)) if isinstance(usual, tuple) else "true" if usual is True else usual
    return f" (default: {shown}{preset})"


def _entry(key: str, meaning: str, width: int, indent: int = 30) -> list[str]:
    """Write a key with its meaning in a column beside it, or below where the key is long."""
    shown = textwrap.wrap(" ".join(meaning.split()), max(20, width - indent), break_on_hyphens=False)
    first = [f"{key:<{indent}}{shown[0]}"] if len(key) < indent - 1 else [key, " " * indent + shown[0]]
    return [*first, *(" " * indent + line for line in shown[1:])]


def parse(command: str, arguments: Sequence[str], *groups: type, defaults: dict[str, Any] | None = None) -> list[Any]:
    """Make an instance of each dataclass in `groups` from `--key value` arguments, which win over `defaults`.

    Every field of every group is a key. Prints help for --help, the result as YAML for --print_config, and raises
    `ConfigError` for an unknown key (with the nearest one) or a value of another type.
    """
    parser = Parser(prog=f"pipestill {command}", exit_on_error=False, default_env=False)
    parser.hints = _hints(groups)
    for group in groups:
        parser.add_class_arguments(group, None, fail_untyped=True)
    known = [f.name for group in groups for f in dataclasses.fields(group)]
    words = _normal(
        ["--out" if word == "-o" and "out" in known else word for word in arguments],
        [f.name for group in groups for f in dataclasses.fields(group) if f.type in (bool, "bool")],
    )
    own = {key: value for group in groups for key, value in getattr(group, "run_defaults", {}).items() if key in known}
    file = defaults.file if isinstance(defaults, FromFile) else ""
    defaults = {**own, **(defaults or {})}
    if "--help" in words or "-h" in words:
        print(_help(command, groups, defaults))
        raise SystemExit(0)
    given = [w[2:].split("=")[0] for w in words if w.startswith("--")]
    _refuse_unknown([key for key in given if key != "print_config"], defaults, known, file)
    wants_print = "--print_config" in words
    values = parser.read(defaults, [w for w in words if w != "--print_config"], file)
    raise_problems(_impossible({key: values[key] for key in known}))
    instances = [group(**{f.name: values[f.name] for f in dataclasses.fields(group)}) for group in groups]
    if wants_print:
        merged = {k: list(v) if isinstance(v, Numbers) else v for i in instances for k, v in vars_of(i).items()}
        name = [("recipe", i.name) for i in instances if hasattr(i, "name")]
        yaml.safe_dump(dict(name) | merged, sys.stdout, sort_keys=False)
        raise SystemExit(0)
    return instances


def vars_of(instance: Any) -> dict[str, Any]:
    """Give a dataclass's fields by name, plain enough for YAML and JSON."""
    return {f.name: _plain_value(getattr(instance, f.name)) for f in dataclasses.fields(instance)}


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return int(value) if isinstance(value, NumBytes) else value


def _normal(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Write keys as their fields are called, `--student_width` for `--student-width`, and a flag on its own as true."""
    out = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        alone = name in flags and not equals and following.lower() not in ("true", "false")
        out.append(f"--{name}=true" if alone else f"--{name}{equals}{value}")
    return out


def _impossible(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of options that are used before a trainer looks at them: no threads, or no time to wait."""
    if values.get("threads") is not None:
        yield from whole("threads", values["threads"], 1)
    if "timeout_seconds" in values:
        yield from real_number("timeout_seconds", values["timeout_seconds"], above=0)


def _refuse_unknown(given: Iterable[str], of_file: Iterable[str], known: Sequence[str], file: str) -> None:
    """Raise `ConfigError` for the keys of a command line and of a config file that there are not."""
    places = [*((key, "") for key in given), *((key, f" in '{file}'" if file else "") for key in of_file)]
    problems = [_RENAMED.get(key) or f"no key '{key}'{where}{nearest(key, known)}" for key, where in places if key not in known]
    if problems:
        raise ConfigError("; ".join(problems) + "; --help lists the keys")


_RENAMED = {"profile": "--profile is part of --costs now, which takes a CSV of blocks too: --costs FILE.csv"}
"""What to say of keys that there were once."""


def given_keys(words: Sequence[str]) -> list[str]:
    """The keys that are on a command line."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]


def spelled(values: Mapping[str, Any]) -> list[str]:
    """Write keys with their values as the words of a command line; a key without a value is left out."""
    words = []
    for key, value in values.items():
        if value is not None:
            shown = ",".join(map(str, value)) or "[]" if isinstance(value, tuple) else str(value)
            words += [f"--{key}"] if value is True else [f"--{key}", shown.lower() if value is False else shown]
    return words


def refuse(words: Sequence[str], keys: Sequence[str], why: str) -> None:
    """Raise `ConfigError` for keys on the command line that would be left unread in silence."""
    given = given_keys(words)
    if found := [key for key in keys if key in given]:
        raise ConfigError("; ".join(f"--{key} {why}" for key in found))


def recipe_and_rest(command: str, arguments: Sequence[str]) -> tuple[type[Recipe], dict[str, Any], list[str]]:
    """Find the recipe that the first argument names, itself or in a YAML file, the file's keys, and the other arguments."""
    if not arguments or arguments[0].startswith("-"):
        if "--help" in arguments or "-h" in arguments:
            width = min(shutil.get_terminal_size().columns, 110)
            recipes = [line for name, entry in RECIPES.items() for line in _entry(f"  {name}", entry.summary, width, 16)]
            usage = f"usage: pipestill {command} RECIPE|config.yaml [--KEY VALUE ...]"
            print("\n".join([usage, "", *_about(command, width), "", "Recipes:", *recipes, ""]))
            more = (
                f"'pipestill {command} {next(iter(RECIPES))} --help' lists the keys. A config.yaml holds a line "
                "'recipe: NAME' and any of those keys; the command line wins over it."
            )
            print("\n".join(textwrap.wrap(more, width)))
            raise SystemExit(0)
        raise ConfigError(
            f"'{command}' needs a recipe or a config.yaml first, as in 'pipestill {command} {next(iter(RECIPES))}'; "
            "'pipestill recipes' lists what there is"
        )
    first, rest = arguments[0], list(arguments[1:])
    if first.endswith((".yaml", ".yml")):
        values = _read_yaml(Path(first))
        name = values.pop("recipe", None)
        values = {key: value for key, value in values.items() if key not in _RENAMED or value is not None}
        if not isinstance(name, str):
            raise ConfigError(f"'{first}' has no line 'recipe: NAME'; add one, such as 'recipe: soft-target'")
        return find(name).load(), FromFile(values, first), rest
    if first.endswith((".json", ".csv")):
        raise ConfigError(
            f"'{first}' is neither a recipe nor a config.yaml, which '{command}' needs first; a file of costs follows --costs"
            + (", and 'pipestill simulate' reads a plan.json" if first.endswith(".json") else "")
        )
    return find(first).load(), {}, rest


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config '{path}': {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"config '{path}' is not YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"config '{path}' is not a list of 'key: value' lines")
    return values
