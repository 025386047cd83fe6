"""The program from outside: help, exit codes, one line per error, closed pipes."""

import errno
import os
import subprocess
import sys

import click
import pytest

from nsa_cli import cli, output
from nsa_models.errors import BatchError, BudgetError, CheckError, InputError, ModelError, NSAError

NSA = [sys.executable, "-m", "nsa_cli"]


def test_bare_nsa_prints_help(nsa):
    assert nsa() == nsa("--help") == nsa("-h")
    code, out, err = nsa()
    assert code == 0 and not err
    assert all(name in out for name in cli.COMMANDS) and "Exit codes" in out


def test_version(nsa):
    run = nsa("--version")
    assert run.code == 0 and run.out.startswith("nsa 0.")


def test_an_unknown_command_suggests_the_nearest(nsa):
    assert nsa("sumarize", "x") == (
        2,
        "",
        "nsa: no command 'sumarize'; did you mean 'summarize'? (see nsa --help)\n",
    )
    assert nsa("xyzzy").err.startswith("nsa: no command 'xyzzy' (see nsa --help)\n")


def test_an_unknown_option_is_a_usage_error(nsa):
    code, out, err = nsa("ask", "--no-such-option", "a", "b")
    assert code == 2 and not out
    (line,) = err.splitlines()
    assert "--no-such-option" in line and line.endswith(" (see nsa ask --help)")


def fails_with(monkeypatch, error: BaseException) -> None:
    """`nsa plan` raises `error`."""

    @click.command()
    @output.verbosity_options
    def command() -> None:
        output.warn("about to fail")
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)


ERRORS = [
    (InputError("a.txt: binary"), 3, "nsa: a.txt: binary"),
    (BudgetError("too\nlong"), 4, "nsa: too long"),
    (ModelError("no checkpoint"), 5, "nsa: no checkpoint"),
    (CheckError("schema"), 6, "nsa: schema"),
    (BatchError("2 of 9 jobs"), 7, "nsa: 2 of 9 jobs"),
    (NSAError("other"), 1, "nsa: other"),
    (OSError(errno.ENOSPC, "No space left on device", "kv"), 1, "nsa: kv: No space left on device"),
    (MemoryError(), 1, "nsa: out of memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"), 1, "nsa: out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "nsa: out of memory"),
    (ValueError("a bug"), 1, "nsa: unexpected ValueError: a bug; -vv shows where"),
    (KeyboardInterrupt(), 130, "nsa: interrupted"),
    (click.Abort(), 130, "nsa: interrupted"),
]


@pytest.mark.parametrize(("error", "code", "line"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_is_one_line_and_an_exit_code(nsa, monkeypatch, error, code, line):
    fails_with(monkeypatch, error)
    run = nsa("plan", "-q")
    assert (run.code, run.out, run.err.count("\n")) == (code, "", 1)
    assert run.err.startswith(line)


def test_vv_shows_the_traceback_before_or_after_the_command(nsa, monkeypatch):
    fails_with(monkeypatch, ValueError("a bug"))
    for args in (["plan", "-vv"], ["-vv", "plan"]):
        assert "Traceback" in nsa(*args).err
    assert "Traceback" not in nsa("plan", "-v").err


def test_quiet_silences_warnings(nsa, monkeypatch):
    fails_with(monkeypatch, InputError("x"))
    assert "about to fail" in nsa("plan").err
    assert "about to fail" not in nsa("plan", "-q").err + nsa("-q", "plan").err


def test_a_closed_pipe_ends_quietly_with_141():
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([*NSA, "--help"], stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        run = subprocess.run([*NSA, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("nsa: ") and run.stderr.count("\n") == 1


def test_progress_is_a_line_per_tenth_with_v_and_else_nothing_off_a_terminal(capsys):
    for level, lines in ((output.NORMAL, 0), (output.VERBOSE, 10)):
        verbosity = output.Verbosity()
        verbosity.level = level
        with click.Context(cli.cli, obj=verbosity), output.progress("reading", 1000) as advance:
            for done in range(50, 1001, 50):
                advance(done, 1000)
        err = capsys.readouterr().err
        assert err.count("\n") == lines
    assert "reading: 50 % of 1,000 tokens\n" in err


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("reading", 1000) as advance:
        advance(1000, 1000)
    err = capsys.readouterr().err
    assert "reading:" in err and "0/1000" in err and "tokens/s" in err
    assert err.endswith("\r")  # gone before the answer comes
