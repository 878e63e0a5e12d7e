"""Docstrings in src/: everything has one, and its first line is a sentence that says what the thing is or does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pipestill"
MODULES = sorted(SOURCE.rglob("*.py"))
NOT_A_SENTENCE = re.compile(r"(Of|Who|What it|For what)\b")
"""Openings that leave a reader to guess the subject."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def protocol_methods() -> Iterator[str]:
    """The names of all methods that a protocol in src/ documents."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "Protocol" in {getattr(base, "id", "") for base in node.bases}:
                yield from (child.name for child in node.body if isinstance(child, ast.FunctionDef))


PROTOCOL_METHODS = set(protocol_methods())


def documented(tree: ast.Module) -> Iterator[tuple[str, Documented, bool]]:
    """The module, its classes, functions and methods, each with its name and whether it must have a docstring.

    Private and special functions, and methods of private classes, explain themselves where names and signatures are enough.
    Methods that a base class or a protocol documents need no second docstring.
    """
    yield "module", tree, True
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node, not node.name.startswith("_")
        for child in getattr(node, "body", ()) if isinstance(node, ast.Module | ast.ClassDef) else ():
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                explained = isinstance(node, ast.ClassDef) and (
                    bool(node.bases) or node.name.startswith("_") or child.name in PROTOCOL_METHODS
                )
                yield child.name, child, not (explained or child.name.startswith("_"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_first_lines_are_sentences(path: Path) -> None:
    wrong = []
    for name, node, needed in documented(ast.parse(path.read_text())):
        text = ast.get_docstring(node)
        line = getattr(node, "lineno", 1)
        if text is None:
            wrong += [f"line {line}: {name} has no docstring"] * needed
            continue
        first = text.splitlines()[0]
        if NOT_A_SENTENCE.match(first):
            wrong.append(f"line {line}: {name} begins with {first.split()[0]!r}: {first}")
        if not first.endswith("."):
            wrong.append(f"line {line}: the first line of {name} is no whole sentence: {first}")
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_is_said_of_attributes_begins_with_a_subject(path: Path) -> None:
    """Strings below an attribute or a constant count as docstrings too."""
    said = [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    wrong = [f"line {text.lineno}: {text.value}" for text in said if NOT_A_SENTENCE.match(str(text.value))]
    assert wrong == []
