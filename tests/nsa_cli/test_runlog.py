"""The run log: a line a run, where it was asked for."""

import io
import json
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.commands.log import to_text
from nsa_cli.runlog import read_log

RUN = b'{"time": "2026-01-02T03:04:05+00:00", "arguments": ["plan", "a"], "exit_code": 3, "answers": []}'
LINES = (
    RUN,
    b"[]",
    b"{}",
    RUN.replace(b"2026", b"20x6"),
    RUN.replace(b'"a"', b"1"),
    RUN.replace(b": []", b': [{"answer": null}]'),
    RUN.replace(b": 3", b': "3"'),
    b"[" * 100_000,
)
ASK = ("who jumps?", "--max-tokens", 8)


def test_a_log_is_kept_only_where_it_is_asked_for(nsa, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    log = tmp_path / "folder" / "runs.jsonl"
    answer = nsa("ask", tmp_path / "a.txt", *ASK).out
    assert not log.exists()
    assert nsa("--log", log, "ask", tmp_path / "a.txt", *ASK).out == answer
    monkeypatch.setenv("NSA_LOG", str(log))
    assert nsa("plan", tmp_path / "nowhere").code == 3
    assert nsa("ask", tmp_path / "a.txt", *ASK, "--no-such-option").code == 2
    assert nsa("--help").code == 0
    asked, failed, refused = (json.loads(line) for line in log.read_text().splitlines())
    assert asked["arguments"][-5:] == ["ask", str(tmp_path / "a.txt"), *map(str, ASK)]
    assert [reply["answer"] + "\n" for reply in asked["answers"]] == [answer]
    assert (asked["exit_code"], failed["exit_code"], refused["exit_code"], failed["answers"]) == (0, 3, 2, [])
    assert asked["seconds"] > 0 and asked["time"].endswith("+00:00") and asked["schema_version"] == 1
    assert log.stat().st_mode & 0o777 == 0o600  # it holds what documents say


def test_a_log_that_cannot_be_written_costs_no_answer(nsa, tmp_path):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    run = nsa("--log", tmp_path / "a.txt" / "runs.jsonl", "ask", tmp_path / "a.txt", *ASK)
    assert run.code == 0 and run.out and "the run log" in run.err


def test_the_settings_file_switches_it_on(nsa, tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_CONFIG_DIR", str(tmp_path))
    (tmp_path / "config.toml").write_text(f'log = "{tmp_path}/runs.jsonl"\n')
    assert nsa("cache", "ls").code == 0
    assert json.loads((tmp_path / "runs.jsonl").read_text())["arguments"] == ["cache", "ls"]


def test_the_log_is_searched_by_words_of_question_and_answer(nsa, tmp_path, monkeypatch):
    (tmp_path / "a b.txt").write_text("the quick fox\n")
    log = tmp_path / "runs.jsonl"
    monkeypatch.setenv("NSA_LOG", str(log))
    # Words that the test's model, whose answers are of any words that it has, does not answer with.
    answer = nsa("ask", tmp_path / "a b.txt", "who is no-4711?", "--max-tokens", 8).out.strip()
    assert nsa("ask", tmp_path / "a b.txt", "Who is no-4712?", "--max-tokens", 8).code == 0
    assert nsa("plan", tmp_path / "nowhere").code == 3
    shown = nsa("log")
    assert shown.code == 0 and [line[:2] for line in shown.out.splitlines()] == ["20", "  ", "20", "  ", "20"]
    assert f"nsa ask '{tmp_path}/a b.txt' 'who is no-4711?' --max-tokens 8\n  {answer}\n" in shown.out
    found = nsa("log", "NO-4712", "ask")
    assert "Who is no-4712?" in found.out and found.out.count("nsa ask") == 1
    assert nsa("log", answer.split()[0], "no-4711").out.count("\n") == 2
    assert nsa("log", "nothing-like-this").out == ""
    failed = nsa("log", "--failed")
    assert failed.out.count("\n") == 1 and failed.out.endswith("nowhere  exit code 3\n")
    assert json.loads(nsa("log", "-n", 1, "--json").out) == json.loads(log.read_text().splitlines()[-1])
    assert log.read_text().count("\n") == 3  # looking is not logged


@given(st.lists(st.binary(max_size=60).filter(lambda b: b"\n" not in b) | st.sampled_from(LINES), max_size=6))
def test_whatever_the_log_holds_what_is_a_run_is_shown(lines):
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()) as err:
        log = Path(folder) / "runs.jsonl"
        log.write_bytes(b"".join(line + b"\n" for line in lines))
        shown = [to_text(run) for run in read_log(log)]
    assert len(shown) == lines.count(RUN) and all(text.endswith("nsa plan a  exit code 3") for text in shown)
    assert ("are no runs" in err.getvalue()) == any(line != RUN for line in lines)


def test_without_a_log_it_says_how_to_keep_one(nsa, tmp_path):
    run = nsa("log")
    assert run.code == 3 and "NSA_LOG" in run.err and run.err.count("\n") == 1
    assert nsa("--log", tmp_path / "none", "log").err == f"nsa: {tmp_path}/none: no such file or directory\n"
