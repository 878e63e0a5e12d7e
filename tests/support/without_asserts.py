"""The package as `python -O` compiles it, for a while and beside the one that tests have.

`python -O` itself would start another process, and compile torch and all else anew wherever that has not been done before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType


class Loader(SourceFileLoader):
    """Compiles a module of the package without its assertions, and keeps nothing."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)
        return code


class Finder(MetaPathFinder):
    """Finds the modules of the package, for that loader."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "pipestill":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def ours() -> dict[str, ModuleType]:
    """Modules that are loaded now: those of the package, and those of `support`, which import from it."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("pipestill", "support")}


@contextmanager
def without_assertions() -> Iterator[None]:
    """Inside, whatever is imported of the package and of `support` is new, and the package has no assertions."""
    kept, finder = ours(), Finder()
    for name in kept:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)
