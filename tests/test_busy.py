import io
import sys

import pytest

from pipestill import busy
from pipestill.busy import Busy


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Impatient:
    """A timer whose time is up at once."""

    def __init__(self, seconds, call):
        self.call = call

    def start(self):
        self.call()

    def cancel(self):
        pass


class Patient(Impatient):
    """A timer whose time is never up."""

    def start(self):
        pass


def test_a_terminal_shows_it_at_once_and_erases_it(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Busy("planning") as note:
        assert screen.getvalue().endswith("pipestill: planning ...")
        note.change("planning fill")
        assert screen.getvalue().endswith("\r\x1b[2Kpipestill: planning fill ...")
        note.stop()
        erased = screen.getvalue()
        assert erased.endswith("\r\x1b[2K")
    assert screen.getvalue() == erased, "stopped once only"


def test_a_long_note_stays_in_one_line_so_that_it_can_be_erased(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    with Busy("comparing sequential, 1f1b and fill on 2 devices"):
        assert screen.getvalue() == "\r\x1b[2Kpipestill: comparing sequential, ..."


@pytest.mark.parametrize(("timer", "said"), [(Impatient, "pipestill: planning ...\n"), (Patient, "")])
def test_elsewhere_a_line_tells_of_what_takes_long(timer, said, monkeypatch, capsys):
    monkeypatch.setattr(busy.threading, "Timer", timer)
    with Busy("planning") as note:
        note.change("planning fill")
    assert capsys.readouterr().err == said


def test_it_ends_with_the_body_even_where_that_fails(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(KeyError), Busy("planning"):
        raise KeyError
    assert screen.getvalue().endswith("\r\x1b[2K")
