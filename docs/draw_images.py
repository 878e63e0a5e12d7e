"""Draws every picture of the README and the docs: `.venv/bin/python docs/draw_images.py`.

Each picture is one command of the tool. The pages quote the same commands; tests/test_docs.py compares them.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipestill.cli import main

_BLOCKS = "simulate --costs docs/blocks.csv"
_UNIFORM = "simulate --uniform 1,1,1,1 --devices 4"
PICTURES = {
    "sequential": f"{_UNIFORM} --microbatches 2 --strategy sequential --steps 1 --draw docs/images/sequential.svg",
    "gpipe": f"{_UNIFORM} --microbatches 8 --strategy gpipe --draw docs/images/gpipe.svg",
    "1f1b": f"{_UNIFORM} --microbatches 8 --strategy 1f1b --draw docs/images/1f1b.svg",
    "fill": f"{_UNIFORM} --microbatches 8 --draw docs/images/fill.svg",
    "fill-split": f"{_UNIFORM} --microbatches 8 --split_backward --draw docs/images/fill-split.svg",
    "momentum": f"{_UNIFORM} --microbatches 8 --teacher ema --draw docs/images/momentum.svg",
    "momentum-split": f"{_UNIFORM} --microbatches 8 --teacher ema --split_backward --draw docs/images/momentum-split.svg",
    "blocks-relay": f"{_BLOCKS} --strategy relay-dpu --devices 4 --draw docs/images/blocks-relay.svg",
    "blocks-hybrid": f"{_BLOCKS} --strategy hybrid --devices 4 --draw docs/images/blocks-hybrid.svg",
    "blocks-balanced": f"{_BLOCKS} --strategy balanced --devices 4 --draw docs/images/blocks-balanced.svg",
    "tspipe": (
        f"{_UNIFORM} --microbatches 3 --strategy tspipe --teacher ema --views 2 --batch_loss --draw docs/images/tspipe.svg"
    ),
}


def draw() -> None:
    """Run every command from the root of the repository, where the paths lead."""
    os.chdir(Path(__file__).parent.parent)
    for command in PICTURES.values():
        print(f"pipestill {command}")
        if main([*command.split(), "--json"]) != 0:
            raise SystemExit(f"failed: pipestill {command}")


if __name__ == "__main__":
    draw()
