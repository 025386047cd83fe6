"""`nsa summarize`: one pass where it fits, else parts and then their summaries, said openly."""

import json
import re
from pathlib import Path

import pytest

import nsa_cli.summarize
from nsa_cli.summarize import Wish

SMALL = ("--max-tokens", 40, "--max-context", 700)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    folder = tmp_path / "book"
    folder.mkdir()
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text("".join(f"the fox {name} runs {i} times over the old dog\n" for i in range(60)))
    return folder


def summary_of(run) -> dict:
    assert run.code == 0, run.err
    return json.loads(run.out)


def test_what_fits_is_summarized_in_one_pass(nsa, book):
    run = nsa("summarize", book, "--max-tokens", 20)
    assert run.code == 0 and run.out.strip() and "part" not in run.err
    reply = summary_of(nsa("summarize", book, "--max-tokens", 20, "--json"))
    assert reply["answer"] + "\n" == run.out and reply["shards"] == 1
    assert summary_of(nsa("summarize", "--json", stdin="the old dog\n" * 30))["answer"]


def test_focus_changes_the_question(nsa, book):
    plain, focused = (
        summary_of(nsa("summarize", book, "--max-tokens", 20, "--json", *focus))["usage"]["prompt_tokens"]
        for focus in ([], ["--focus", "the dog"])
    )
    assert focused > plain


def test_longer_text_is_summarized_in_parts_and_says_so(nsa, book):
    run = nsa("summarize", book, *SMALL, "--json")
    reply = summary_of(run)
    n = reply["shards"]
    assert n > 2 and f"reading {n} parts" in run.err
    assert all(f"nsa: part {i} of {n}, " in run.err for i in range(1, n + 1))
    whole = summary_of(nsa("summarize", book, "--max-tokens", 40, "--json"))["usage"]["prompt_tokens"]
    assert reply["usage"]["prompt_tokens"] > whole
    assert reply["usage"]["completion_tokens"] >= 40 * (n + 1)
    assert 0 < len(reply["evidence"]) <= 5
    assert {place["path"] for place in reply["evidence"]} <= {"one.txt", "two.txt"}  # never a part's summary
    lifts = [place["lift"] for place in reply["evidence"]]
    assert lifts == sorted(lifts, reverse=True)


def test_only_the_last_summary_is_printed(nsa, book):
    run = nsa("summarize", book, *SMALL)
    assert run.out == summary_of(nsa("summarize", book, *SMALL, "--json"))["answer"] + "\n"


def test_parts_are_stored_like_any_context(nsa, book):
    cold, warm = (summary_of(nsa("summarize", book, *SMALL, "--json")) for _ in range(2))
    assert warm["answer"] == cold["answer"]
    assert warm["usage"]["cached_tokens"] > warm["usage"]["prompt_tokens"] // 2


def test_summaries_that_shorten_nothing_are_refused(nsa, book):
    run = nsa("summarize", book, "--max-tokens", 500, "--max-context", 700)
    assert (run.code, run.out) == (4, "")
    (message,) = run.err.splitlines()  # before any part is read
    longest = int(re.search(r"lower --max-tokens to (\d+)", message)[1])
    assert nsa("summarize", book, "--max-tokens", longest, "--max-context", 700).code == 0


def test_ctrl_c_in_a_part_ends_without_a_summary(nsa, book, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(nsa_cli.summarize, "answer", interrupted)
    run = nsa("summarize", book, *SMALL)
    assert (run.code, run.out) == (130, "") and run.err.endswith("nsa: interrupted\n")


def test_a_missing_document_is_refused(nsa, tmp_path):
    assert nsa("summarize", tmp_path / "nowhere").code == 3
    assert nsa("summarize", stdin="").code == 3


def test_length_and_style_are_asked_of_the_model():
    assert Wish().wording("Summarize") == "Summarize."
    assert Wish("the dog", "short", "bullets").wording("Summarize") == (
        "Summarize in one or two sentences, as a list of bullet points. Concentrate on this: the dog"
    )
    assert Wish(length=80).wording("Summarize") == "Summarize in about 80 words."


def test_many_words_raise_the_limit_unless_it_is_given(nsa, book):
    def tokens(*options):
        return summary_of(nsa("summarize", book, "--json", "--no-cache", *options))["usage"]["completion_tokens"]

    assert tokens("--length", 300) == 600
    assert tokens("--length", 300, "--max-tokens", 20) == 20
    assert tokens("--length", "short", "--style", "plain", "--max-tokens", 9) == 9
    assert nsa("summarize", book, "--length", "0").code == nsa("summarize", book, "--style", "x").code == 2


def test_a_summary_for_every_file_and_chapter(nsa, book, monkeypatch):
    monkeypatch.chdir(book)
    run = nsa("summarize", ".", "--per", "file", "--max-tokens", 20)
    alone = [nsa("summarize", name, "--max-tokens", 20).out for name in ("one.txt", "two.txt")]
    assert run.out == f"## one.txt\n\n{alone[0]}\n## two.txt\n\n{alone[1]}"
    story = "the fox jumps over the dog and runs away from the forest\n" * 8
    (book / "one.txt").write_text(f"CHAPTER I\n\n{story}\nCHAPTER II\n\n{story}")
    run = nsa("summarize", "one.txt", "--per", "chapter", "--max-tokens", 20, "--json")
    replies = [json.loads(line) for line in run.out.splitlines()]
    assert [reply["part"] for reply in replies] == ["one.txt: CHAPTER I", "one.txt: CHAPTER II"]
    places = [place for reply in replies for place in reply["evidence"]]
    assert all(1 <= place["start"] <= place["end"] <= 22 for place in places)
