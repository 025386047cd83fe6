"""The run log: a line a run, where it was asked for."""

import json

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
