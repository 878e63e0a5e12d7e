"""Tells a person on stderr what a command is doing while nothing else is printed."""

from __future__ import annotations

import shutil
import sys
import textwrap
import threading
from types import TracebackType

_PATIENCE_SECONDS = 1.0


class Busy:
    """A note on stderr that lasts as long as the body of a `with` statement.

    On a terminal it is shown at once and erased at the end. Elsewhere it is a line, printed only where the body takes longer
    than a second.

    Args:
        what: what goes on, such as "measuring blocks"
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._is_terminal = sys.stderr.isatty()
        self._timer = threading.Timer(_PATIENCE_SECONDS, self._print)

    def __enter__(self) -> Busy:
        if self._is_terminal:
            self._print()
        else:
            self._timer.daemon = True
            self._timer.start()
        return self

    def change(self, what: str) -> None:
        """Show something else from now on, where the note is on a terminal."""
        self.what = what
        if self._is_terminal:
            self._print()

    def stop(self) -> None:
        """End the note before the body ends; more than once does no harm."""
        self._timer.cancel()
        if self._is_terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._is_terminal = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _print(self) -> None:
        text = f"pipestill: {self.what} ..."
        if self._is_terminal:  # only one line can be erased
            text = "\r\x1b[2K" + textwrap.shorten(text, shutil.get_terminal_size().columns - 1, placeholder=" ...")
        print(text, end="" if self._is_terminal else "\n", file=sys.stderr, flush=True)
