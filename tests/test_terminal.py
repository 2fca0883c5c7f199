"""Does the command line work on any terminal? Encodings that lack characters, pipes that close, no command at all."""

import io
import json
import os
import subprocess
import sys

import pytest

import pyfused
from pyfused.cli import main

TEXT = "Let there be \u201clight\u201d, na\u00efve \u2192 \U0001f600"
SHOWN = {
    "ascii": "Let there be ?light?, na?ve ? ?",
    "latin-1": "Let there be ?light?, na\u00efve ? ?",
    "cp1252": "Let there be \u201clight\u201d, na\u00efve ? ?",
    "utf-8": TEXT,
}
GENERATE = ["generate", "gpt2_tiny_en", "--max-new-tokens", "3", "--prompt"]
ENCODE = ["encode", "albert_tiny_en", "--pool", "mean", "--text"]


@pytest.fixture
def terminal(monkeypatch):
    """A stdout with an encoding; call the result to get the written text."""

    def of(encoding, errors="strict"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", stream)

        def written():
            stream.flush()
            return stream.buffer.getvalue().decode(encoding)

        return stream, written

    return of


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter is Python's own choice in the C locale
@pytest.mark.parametrize("encoding", SHOWN)
@pytest.mark.parametrize("command", [GENERATE, ENCODE], ids=["generate", "encode"])
def test_the_rest_is_replaced(terminal, encoding, errors, command):
    stream, written = terminal(encoding, errors)
    assert main([*command, TEXT]) == 0
    assert written().startswith(SHOWN[encoding])
    assert stream.errors == errors  # as it was


@pytest.mark.parametrize("command", [GENERATE, ENCODE], ids=["generate", "encode"])
def test_json_is_ascii_and_whole(terminal, command):
    _, written = terminal("ascii")
    assert main([*command, TEXT, "--json"]) == 0
    facts = json.loads(written())
    assert (facts["prompt"] if "prompt" in facts else facts["texts"][0]["text"]) == TEXT


def test_the_users_own_choice_of_errors_counts(terminal):
    _, written = terminal("ascii", "backslashreplace")
    assert main([*GENERATE, "na\u00efve"]) == 0
    assert written().startswith(r"na\xefve")


@pytest.mark.parametrize("command", [GENERATE, ENCODE], ids=["generate", "encode"])
def test_bytes_that_the_locale_cannot_read(terminal, command):
    """os.fsdecode turns such bytes into lone surrogates. UTF-8 among them is decoded, the rest replaced."""
    for raw, shown in (("na\u00efve".encode(), "na\u00efve"), (b"na\xefve", "na\ufffdve")):
        _, written = terminal("utf-8")
        assert main([*command, raw.decode("ascii", "surrogateescape")]) == 0
        assert written().startswith(shown)


def run(*arguments, **environment):
    command = [sys.executable, "-m", "pyfused", *arguments]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=600)


def test_a_real_ascii_terminal():
    out = run(*GENERATE, TEXT, PYTHONIOENCODING="ascii")
    assert out.returncode == 0, out.stderr
    assert out.stdout.decode("ascii").startswith(SHOWN["ascii"])
    out = run("generate", "\u2192", "--prompt", "x", PYTHONIOENCODING="ascii")
    assert out.returncode == 2
    assert out.stderr.decode("ascii").startswith(r"pyfused: preset is '\u2192'")


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pyfused {pyfused.__version__}\n"
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: pyfused")
    for command in ("env", "generate", "encode", "verify", "--version"):
        assert command in out
    alone = run()
    assert (alone.returncode, alone.stdout.decode().split()[:2], alone.stderr) == (0, ["usage:", "pyfused"], b"")


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    out = subprocess.run([sys.executable, "-m", "pyfused", "env"], stdout=write, stderr=subprocess.PIPE, timeout=600)
    os.close(write)
    assert out.stderr == b""
    assert out.returncode == 141
