"""Reads `--key value` arguments and the keys of a config file, through jsonargparse, and says what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from pipestill.arguments import raise_problems
from pipestill.errors import ConfigError
from pipestill.recipes.run_options import Numbers, NumBytes

register_type(Numbers, serializer=list, deserializer=Numbers.parse, deserializer_exceptions=(ValueError,))
register_type(NumBytes, serializer=int, deserializer=NumBytes.parse, deserializer_exceptions=(ValueError,))


class FromFile(dict[str, Any]):
    """The keys of a config file with their values, and the file's name for messages."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        super().__init__(values)
        self.file = file


class _WrongValue(ConfigError):
    """A key has a value that it does not take."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Parser(ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and exit."""

    hints: Mapping[str, Any] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        plain = " ".join(message.split())
        wrong = _wrong_value(plain)
        if wrong and wrong[0] in self.hints:
            raise _WrongValue(wrong[0], f"{wrong[0]} takes {_wanted(self.hints[wrong[0]])}, got '{wrong[1]}'")
        raise ConfigError(_plain(plain))

    def read(self, defaults: Mapping[str, Any], words: Sequence[str], file: str) -> dict[str, Any]:
        """The values of all keys: those of the words win over the defaults. Raises one error that names all wrong values.

        `words` are `--key value` and `--key=value`; `file` is where the defaults come from, for messages.
        """
        problems = []
        usual, given = dict(defaults), list(words)
        while True:
            try:
                self.set_defaults({key: value for key, value in vars(self.parse_object(usual)).items() if key in self.hints})
                break
            except _WrongValue as wrong:
                if wrong.key not in usual:
                    raise
                problems.append(f"{wrong}{f' in {file!r}' if file else ''}")
                del usual[wrong.key]
        while True:
            try:
                values = vars(self.parse_args(given))
                break
            except _WrongValue as wrong:
                if (left := _without(wrong.key, given)) == given:
                    raise
                problems.append(str(wrong))
                given = left
        raise_problems(problems)
        return values


_WANTED = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Numbers: "whole numbers such as 3,3",
    NumBytes: "an amount such as 80GB or 512MiB",
}


def _plain(message: str) -> str:
    """What a parser complains about, in words for a user."""
    if left := re.match(r"unrecognized arguments: (.*)$", message):
        return f"cannot tell what '{left[1]}' is for; every option is --key value, and --help lists the keys"
    if lone := re.match(r"argument (--\w+): expected one argument$", message):
        return f"{lone[1]} needs a value"
    return message


def _wrong_value(message: str) -> tuple[str, str] | None:
    """The key and the value that a parser complains about, where it does about one."""
    found = re.match(r'Parser key "(\w+)":.* (?:Got|Given) value:(.*)$', message)
    return (found[1], found[2].strip()) if found else None


def _without(key: str, words: Sequence[str]) -> list[str]:
    """The words of a command line without a key and its value."""
    out: list[str] = []
    skip = False
    for word in words:
        name, equals, _ = word.partition("=")
        if name == f"--{key}":
            skip = not equals
        elif not skip or word.startswith("--"):
            out.append(word)
            skip = False
        else:
            skip = False
    return out


def _wanted(hint: Any) -> str:
    """The values that a key takes."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return " or ".join(map(str, kinds)) if get_origin(hint) is Literal else _WANTED[kinds[0]]
