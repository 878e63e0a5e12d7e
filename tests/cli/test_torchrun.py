"""What a rank under torchrun says when another one has failed."""

import sys

import pytest

from pipestill.cli import main as cli


def test_lost_peer_is_told_in_one_line_under_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(words: list[str]) -> int:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer")

    main = sys.modules["pipestill.cli.main"]
    monkeypatch.setattr(main, "_dispatch", lost)
    monkeypatch.setattr(main, "_YIELD_SECONDS", 0.0)
    monkeypatch.setattr("os._exit", lambda status: None)
    assert cli(["train"]) == 1
    assert "Traceback" in capsys.readouterr().err  # without torchrun, nobody else tells
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli(["train"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pipestill: lost another rank: [gloo")
    assert "Traceback" not in err
