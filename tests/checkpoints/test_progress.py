"""Is loading shown on a terminal, and only there?"""

import contextlib
import io
import sys

import pytest

from pyfused import Backbone
from pyfused.checkpoints import progress, quiet


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function that puts a terminal in stderr's place. (pytest puts its own there between a fixture and its test.)"""

    def put() -> Terminal:
        monkeypatch.delenv("PYFUSED_QUIET", raising=False)
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return put


def test_a_large_checkpoint_has_a_bar(terminal, monkeypatch):
    stderr = terminal()
    monkeypatch.setattr(progress, "_FROM_BYTES", 1)
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    Backbone.from_preset("gpt2_tiny_en")
    states = stderr.getvalue().split("\r")[1:]
    assert len(states) > 20
    shares = [int(state.split("%")[0].split()[-1]) for state in states]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert states[-1].startswith("loading gpt2_tiny_en: ##############################")
    assert states[-1].endswith("GB\n")


def test_a_small_one_has_none(terminal):
    stderr = terminal()
    Backbone.from_preset("gpt2_tiny_en")
    assert stderr.getvalue() == ""


def test_quiet(terminal, monkeypatch):
    stderr = terminal()
    monkeypatch.setattr(progress, "_FROM_BYTES", 1)
    with quiet():
        Backbone.from_preset("gpt2_tiny_en")
        progress.say("nothing")
    monkeypatch.setenv("PYFUSED_QUIET", "1")
    Backbone.from_preset("gpt2_tiny_en")
    assert stderr.getvalue() == ""
    monkeypatch.setenv("PYFUSED_QUIET", "0")
    progress.say("something")
    assert stderr.getvalue() == "pyfused: something\n"


def test_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_FROM_BYTES", 1)
    Backbone.from_preset("gpt2_tiny_en")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    Backbone.from_preset("gpt2_tiny_en")


def test_a_bar_that_fails_ends_its_line(terminal, monkeypatch):
    stderr = terminal()
    monkeypatch.setattr(progress, "_FROM_BYTES", 1)
    with contextlib.suppress(KeyboardInterrupt), progress.loading("model", 10**9) as advance:
        advance(4 * 10**8)
        raise KeyboardInterrupt
    assert stderr.getvalue().endswith("40%  0.4 of 1.0 GB\n")
