"""`pipestill recipes [--json]`."""

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table

from pipestill.cli.options import parse
from pipestill.recipes import RECIPES

_MODULES = {"scikit-learn": "sklearn"}


@dataclass(frozen=True)
class RecipesOptions:
    """How the list is printed.

    Args:
        json: print everything as one JSON object
    """

    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    (options,) = parse("recipes", words, RecipesOptions)
    missing = {name: missing_packages(entry.needs) for name, entry in RECIPES.items()}
    if options.json:
        recipes = [
            {key: value for key, value in asdict(entry).items() if key != "home"} | {"missing": missing[name]}
            for name, entry in RECIPES.items()
        ]
        print(json.dumps({"recipes": recipes}))
        return 0
    table = Table("recipe", "what it does", "data", "needs")
    for name, entry in RECIPES.items():
        state = f" (missing: pip install {' '.join(missing[name])})" if missing[name] else " (installed)"
        table.add_row(name, entry.summary, entry.data, ", ".join(entry.needs) + state)
    Console().print(table)
    return 0


def missing_packages(needs: tuple[str, ...]) -> list[str]:
    """List those of the named packages that cannot be imported."""
    return [need for need in needs if find_spec(_MODULES.get(need, need)) is None]
