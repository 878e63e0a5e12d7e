"""What `import pipestill as ps` offers: everything is there, and every parameter of it is documented."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from itertools import pairwise
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest

import pipestill as ps


def public() -> dict[str, Any]:
    """Every public class and function, by name; of modules their own, by `module.name`."""
    found: dict[str, Any] = {}
    for name in ps.__all__:
        value = getattr(ps, name)
        if not isinstance(value, ModuleType):
            found[name] = value
            continue
        for own in getattr(value, "__all__", vars(value)):
            member = getattr(value, own)
            here = getattr(member, "__module__", "").startswith(value.__name__)
            if here and not own.startswith("_") and isinstance(member, (type, FunctionType)):
                found[f"{name}.{own}"] = member
    return found


def described(text: str | None) -> set[str]:
    """The names in the Args section of a docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(text or ""), re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", section[1], re.MULTILINE)) if section else set()


def field_notes(kind: type) -> set[str]:
    """The fields of a class and of those that it derives from that a text follows in the source."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("pipestill.")]
    return set().union(*map(_own_field_notes, ours))


def _own_field_notes(kind: type) -> set[str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id
        for field, note in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
    }  # fmt: skip


def parameters(called: Any) -> set[str]:
    return {name for name in inspect.signature(called).parameters if name not in ("self", "cls")}


def undocumented(value: Any) -> list[str]:
    """The parameters that have no entry, of a function, or of a class and its public methods."""
    if isinstance(value, FunctionType):
        return sorted(parameters(value) - described(value.__doc__))
    missing: list[str] = []
    if value.__init__ is not object.__init__ and not issubclass(value, BaseException):
        init = inspect.getdoc(value.__init__)
        missing += sorted(parameters(value) - described(value.__doc__) - described(init) - field_notes(value))
    fields = getattr(value, "__dataclass_fields__", ())  # a function may be a field's default
    for name in vars(value):
        method = getattr(value, name)
        if isinstance(method, (FunctionType, MethodType)) and not name.startswith("_") and name not in fields:
            mine = parameters(method) - described(inspect.getdoc(method))
            missing += [f"{name}({parameter})" for parameter in sorted(mine)]
    return missing


@pytest.mark.parametrize("name", public())
def test_every_parameter_is_documented(name: str) -> None:
    value = public()[name]
    assert value.__doc__, name
    assert not undocumented(value)


def test_public_names_are_listed_without_loading_torch() -> None:
    code = "import pipestill as ps, sys; print(sorted(set(ps.__all__) - set(dir(ps))), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"
    assert all(getattr(ps, name) is not None for name in ps.__all__)
    with pytest.raises(AttributeError, match="module 'pipestill' has no attribute 'Trianer'"):
        _ = ps.Trianer


def test_parameters_are_found_in_docstrings() -> None:
    def one(a: int, b: int, *, c: int) -> None:
        """Do it.

        Args:
            a: first.
            b (int): second, over
                two lines with d: in them.

        Returns:
            c: nothing.
        """

    assert described(one.__doc__) == {"a", "b"}
    assert undocumented(one) == ["c"]
    assert "strategy" in field_notes(ps.Result)
