"""`pipestill COMMAND ...`: finds the command, and turns every error into one message and a status."""

import os
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from pipestill.busy import Busy
from pipestill.cli.commands import COMMANDS
from pipestill.errors import ConfigError, PipestillError, RankFailure, UserError, nearest

_YIELD_SECONDS = 3.0
"""How long a rank under torchrun that lost a peer leaves the word to the rank that failed first."""


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    more = "'pipestill COMMAND --help' lists a command's options; 'pipestill --version' tells the version."
    return "\n".join(["usage: pipestill COMMAND [...]", "", *lines, "", *textwrap.wrap(more, 80)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 the user's input is wrong, 130 Ctrl-C, 1 anything else."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    status = _run(words)
    if status and "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        os._exit(status)  # sockets of a broken job must not hold the exit that tells torchrun to end the others
    return status


def _run(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except SystemExit as done:  # after help
        return int(done.code or 0)
    except RankFailure as failure:
        print(failure.detail, end="", file=sys.stderr)
        return _complain(failure, failure.status)
    except UserError as error:
        return _complain(error, 2)
    except PipestillError as error:
        _leave_the_word(error)
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)  # as shells expect it, and loops in them end
    except BrokenPipeError:
        return 1
    except Exception as error:
        if _leave_the_word(error):
            return _complain(f"lost another rank: {error}", 1)
        traceback.print_exc()
        return _complain(f"{type(error).__name__}: {error}", 1)


def _leave_the_word(error: Exception) -> bool:
    """Wait, under torchrun, where this rank only lost another one, which speaks first; whether this was so."""
    lost = "TORCHELASTIC_RUN_ID" in os.environ and import_module("pipestill.runtime.launch").has_lost_peer(error)
    if lost:
        time.sleep(_YIELD_SECONDS)
    return lost


def _dispatch(words: list[str]) -> int:
    if not words:
        print(usage())
        return 2
    command, rest = words[0], words[1:]
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command in ("-V", "--version"):
        print(f"pipestill {version('pipestill')}")
        return 0
    if command not in COMMANDS:
        raise ConfigError(f"no command '{command}'{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
    if command != "train" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"torchrun runs 'train' only, and '{command}' once on each rank; run it without torchrun")
    with Busy("starting"):
        run: Callable[[list[str]], int] = import_module(f"pipestill.cli.{command}").run
    return run(rest)


def _complain(message: object, status: int) -> int:
    """Print a message: wrapped between words on a terminal, and in one line elsewhere."""
    text = f"pipestill: {message}"
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        wrapped = (textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
        text = "\n".join(line for lines in wrapped for line in lines or [""])
    print(text, file=sys.stderr)
    return status
