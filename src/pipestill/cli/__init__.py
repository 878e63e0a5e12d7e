"""The command line: parse, call, print."""

from pipestill.cli.main import main

__all__ = ["main"]
