"""Prints what `refusals` prints, with the package compiled as `python -O` does: run as a program.

`python -O` itself would compile torch and all else anew wherever that has not been done before, for ten seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


def main() -> None:
    sys.meta_path.insert(0, Finder())
    from pipestill.runtime.world import OneProcess
    from support import refusals

    assert OneProcess(1).broadcast(None) is None, "this asserts that there is a value, where there are assertions"
    refusals.main()


if __name__ == "__main__":
    main()
