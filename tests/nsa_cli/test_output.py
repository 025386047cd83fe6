"""Colour, and output into a file."""

import json
import os
import pty
import subprocess
import sys

import pytest

from nsa_cli import output

ESCAPE = "\x1b["
ASK = ("who jumps?", "--max-tokens", 8, "--json")


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        ([], {}, False),  # not a terminal
        ([], {"FORCE_COLOR": "1"}, True),
        ([], {"CLICOLOR_FORCE": "1"}, True),
        ([], {"FORCE_COLOR": "0"}, False),
        ([], {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
        (["--color", "never"], {"FORCE_COLOR": "1"}, False),
        (["--color", "auto"], {"FORCE_COLOR": "1"}, True),
    ],
)
def test_who_decides_about_colour(nsa, monkeypatch, flag, environment, expected):
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for args in (["plan", "nowhere", *flag], [*flag, "plan", "nowhere"]):
        run = nsa(*args)
        assert run.code == 3 and (ESCAPE in run.err) == expected, args
        assert run.err.replace("\x1b[31m", "").replace("\x1b[0m", "").startswith("nsa: no such file")


@pytest.mark.parametrize(("term", "expected"), [("xterm", True), ("dumb", False)])
def test_colour_on_a_terminal(term, expected):
    leader, follower = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if "COLOR" not in k} | {"TERM": term}
    subprocess.run([sys.executable, "-m", "nsa_cli", "plan", "nowhere"], stderr=follower, env=environment)
    os.close(follower)
    assert (ESCAPE.encode() in os.read(leader, 1000)) == expected
    os.close(leader)


def test_an_answer_has_no_colour(nsa, tmp_path):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    assert ESCAPE not in nsa("ask", tmp_path, *ASK, "--color", "always").out


def test_output_into_a_file_is_what_stdout_gets(nsa, tmp_path):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    out = tmp_path / "answer.json"
    (tmp_path / "link").symlink_to(out)
    for target in ("answer.json", "link"):
        out.write_text("old")
        out.chmod(0o640)
        run = nsa("ask", tmp_path / "a.txt", *ASK, "-o", tmp_path / target)
        assert (run.code, run.out) == (0, "") and json.loads(out.read_text())["answer"]
        assert out.stat().st_mode & 0o777 == 0o640 and (tmp_path / "link").is_symlink()
    assert json.loads(nsa("ask", tmp_path / "a.txt", *ASK, "-o", "-").out)
    assert nsa("plan", tmp_path / "a.txt", "-o", tmp_path / "plan").out == ""
    assert "tokens in 1 file" in (tmp_path / "plan").read_text()
    assert nsa("plan", tmp_path / "a.txt", "-o", os.devnull) == (0, "", "")


def test_a_file_is_not_touched_when_the_command_fails(nsa, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    out = tmp_path / "out.txt"
    out.write_text("old")
    assert nsa("plan", tmp_path / "nowhere", "-o", out).code == 3
    assert nsa("plan", tmp_path / "a.txt", "--max-context", 600, "-o", out).code == 4
    for wrong in (tmp_path, tmp_path / "no" / "out.txt"):
        run = nsa("ask", tmp_path / "a.txt", *ASK, "-o", wrong)
        assert run.code == 3 and str(wrong) in run.err

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", fail)
    run = nsa("ask", tmp_path / "a.txt", *ASK, "-o", out, "--no-cache")
    assert run.code == 1 and run.err.endswith("nsa: No space left on device\n")
    assert out.read_text() == "old" and not list(tmp_path.glob(".out*"))
