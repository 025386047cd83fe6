"""`nsa chat`: one reading, questions that know those before them, and what ends what."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_cli.chat import begin, chat
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.chat import typed_lines
from nsa_cli.context import build_context
from nsa_cli.conversation import Conversation
from nsa_cli.documents import Document
from nsa_cli.output import silent
from nsa_cli.request import Request
from nsa_models.errors import BudgetError
from nsa_models.sampling import Sampling

TEXT = "the quick brown fox jumps over the lazy dog and runs away\n" * 20
SHORT = ("--max-tokens", 12)
EXACT = (*SHORT, "--dtype", "float32")  # what is generated, and read again later, differs by roundings


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Named as seen from its folder: what is asked holds the path, and pytest numbers the folders of its runs. With
    number 403 two words nearly tied, and roundings decided.
    """
    monkeypatch.chdir(tmp_path)
    path = Path("a.txt")
    path.write_text(TEXT)
    return path


def replies(run) -> list[dict]:
    assert run.code == 0, run.err
    return [json.loads(line) for line in run.out.splitlines()]


def test_each_question_knows_those_before_it_and_reset_forgets_them(nsa, text):
    lines = "who runs?\n\nwho runs?\n/reset\nwho runs?\n/what\n/quit\nnever asked\n"
    run = nsa("chat", text, *SHORT, "--json", stdin=lines)
    first, second, third = replies(run)
    assert third["answer"] == first["answer"] == replies(nsa("ask", text, "who runs?", *SHORT, "--json"))[0]["answer"]
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 12
    assert first["usage"]["cached_tokens"] == 0 < third["usage"]["cached_tokens"] < second["usage"]["cached_tokens"]
    assert "nsa: a new conversation" in run.err and "/reset begins" in run.err


def test_answers_are_lines_of_text(nsa, text):
    run = nsa("chat", text, *SHORT, stdin="who runs?\nwho jumps?\n")
    assert run.code == 0 and run.out.count("\n") == 2 and run.err.count("prefill ") == 2


def test_what_is_in_the_cache_is_the_whole_conversation(tiny_checkpoint):
    """The second answer is the one that follows from reading everything anew, in one piece."""
    from nsa_models import Cache, decode, prefill

    checkpoint = Checkpoint(str(tiny_checkpoint))
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    context = build_context([Document("a.txt", TEXT)], tokenizer)
    sampling = Sampling(max_tokens=9)
    conversation = Conversation(checkpoint, context, Request(sampling, store="off"), 4000)
    pieces: list[str] = []
    conversation.ask("who runs?", silent)
    second = conversation.ask("and who jumps?", pieces.append)

    first, then = tokenizer.prompt("who runs?"), tokenizer.follow_up("and who jumps?")

    def follows(ids: list[int]) -> list[int]:
        cache = Cache.for_model(model, 4000)
        logits = prefill(model, ids, cache)
        return list(decode(model, cache, logits, sampling, eos_ids=tokenizer.eos_ids))

    prompt = first.before + context.ids + first.after
    whole = prompt + follows(prompt) + then.before + then.after
    text = tokenizer.decode(whole)
    assert text.index("who runs?") < text.index("and who jumps?") and "<|im_end|>" not in text
    assert "".join(pieces) == second.text == tokenizer.decode(follows(whole)).lstrip()
    assert second.usage.prompt_tokens == len(whole)


def test_a_conversation_that_is_full_says_so(nsa, text):
    run = nsa("chat", text, "--max-tokens", 100, "--max-context", 800, stdin="who runs?\n" * 9)
    assert run.code == 4 and run.out.count("\n") >= 1
    assert "the conversation takes" in run.err.splitlines()[-1]
    assert nsa("chat", text, "--max-context", 300, stdin="who?").code == 4


def test_who_types_keeps_the_conversation_after_a_mistake(tiny_checkpoint, capsys, monkeypatch):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    context = build_context([Document("a.txt", TEXT)], checkpoint.tokenizer)
    request = Request(Sampling(max_tokens=200), store="off", max_context=len(context.ids) + 300)
    conversation = begin(checkpoint, context, request)
    chat(conversation, ["who runs?", "x " * 300, "/reset", "who runs?"], False, patient=True)
    out, err = capsys.readouterr()
    first, again = out.splitlines()
    assert first == again and "/reset begins a new one" in err
    with pytest.raises(BudgetError):
        chat(conversation, ["x " * 300], False, patient=False)

    import nsa_models.engine

    decode = nsa_models.engine.decode

    def interrupted(*args, **options):
        yield next(decode(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(nsa_models, "decode", interrupted)
    conversation.reset()
    chat(conversation, ["who runs?"], False, patient=True)
    conversation.reset()
    with pytest.raises(KeyboardInterrupt):
        chat(conversation, ["who runs?"], False, patient=False)


@pytest.mark.parametrize("reading", ["read_question", "read_again"])
def test_ctrl_c_while_a_question_is_read_takes_it_back(reading, tiny_checkpoint, capsys, monkeypatch):
    """The next one is answered as if it had not been asked."""
    from nsa_cli import conversation as module

    checkpoint = Checkpoint(str(tiny_checkpoint))
    context = build_context([Document("a.txt", TEXT * 9)], checkpoint.tokenizer)
    conversation = begin(checkpoint, context, Request(Sampling(max_tokens=5), store="off", reread=400))
    whole = getattr(module, reading)

    def interrupted(*args):
        whole(*args)
        raise KeyboardInterrupt

    said = []
    for between in ([], ["what does it jump over?"]):
        conversation.reset()
        chat(conversation, ["who runs?"], False, patient=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, reading, interrupted)
            chat(conversation, between, False, patient=True)
        chat(conversation, ["from whom?"], False, patient=True)
        said.append((capsys.readouterr().out, conversation.turns, conversation.cache.length))
    assert said[0] == said[1] and len(said[0][1]) == 2


def test_a_session_goes_on_where_it_was_and_a_copy_is_a_branch(nsa, text, tmp_path):
    session, branch = tmp_path / "s.jsonl", tmp_path / "branch.jsonl"
    once = replies(nsa("chat", text, *EXACT, "--json", stdin="who runs?\nand who jumps?\nwhy?\n"))
    first = replies(nsa("chat", text, *EXACT, "--json", "--session", session, stdin="who runs?\n"))
    run = nsa("chat", text, *EXACT, "--json", "--session", session, stdin="and who jumps?\n")
    branch.write_bytes(session.read_bytes())
    assert "going on after 1 questions; the last: who runs?" in run.err
    third = replies(nsa("chat", text, *EXACT, "--json", "--session", session, stdin="why?\n"))
    assert [r["answer"] for r in (*first, *replies(run), *third)] == [r["answer"] for r in once]
    assert [r["usage"]["prompt_tokens"] for r in (*first, *replies(run), *third)] == [
        r["usage"]["prompt_tokens"] for r in once
    ]
    turns = [json.loads(line) for line in session.read_text().splitlines()]
    assert [(t["question"], t["answer"]) for t in turns] == list(
        zip(("who runs?", "and who jumps?", "why?"), (r["answer"] for r in once), strict=True)
    )
    assert len(branch.read_text().splitlines()) == 2
    assert nsa("chat", text, "--session", branch, "--max-context", 800, stdin="why?").code == 4


def test_undo_takes_the_last_question_back(nsa, text, tmp_path):
    session = tmp_path / "s.jsonl"
    lines = "/undo\nwho runs?\nand who jumps?\n/undo\nand who jumps?\n/undo\n"
    run = nsa("chat", text, *EXACT, "--json", "--session", session, stdin=lines)
    _, second, again = replies(run)
    assert second["answer"] == again["answer"] and second["usage"]["prompt_tokens"] == again["usage"]["prompt_tokens"]
    assert "nothing to take back" in run.err and run.err.count("taken back: and who jumps?") == 2
    assert [json.loads(line)["question"] for line in session.read_text().splitlines()] == ["who runs?"]
    assert nsa("chat", text, "--session", session, stdin="/reset\n").code == 0 and session.read_text() == ""


def test_a_turn_may_be_written_by_hand_and_nothing_else_is_one(nsa, text, tmp_path):
    session = tmp_path / "s.jsonl"
    changed = {"question": "who?", "answer": "the dog", "tokens": [1, 2]}
    for turn in (changed, {"question": "who?", "answer": "the dog"}):
        session.write_text(json.dumps(turn) + "\n\n")
        (reply,) = replies(nsa("chat", text, *SHORT, "--json", "--session", session, stdin="and then?\n"))
    assert json.loads(session.read_text().splitlines()[0])["answer"] == "the dog" and reply["answer"]
    for wrong in ("{", "[]", "{}", '{"question": 1, "answer": ""}', '{"question": "a", "answer": "b", "tokens": 3}'):
        session.write_text(json.dumps(changed) + "\n" + wrong)
        run = nsa("chat", text, "--session", session, stdin="who?\n")
        assert run.code == 3 and f"{session} line 2: not a turn" in run.err and run.err.count("\n") == 1
        assert session.read_text().endswith(wrong)


@pytest.mark.parametrize(("args", "code"), [((), 2), (("-",), 2), (("nowhere",), 3)])
def test_what_is_refused(nsa, args, code):
    assert nsa("chat", *args, stdin="who?").code == code


def test_at_a_terminal_it_prompts(text, tiny_checkpoint, tmp_path):
    import pty

    parent, child = pty.openpty()
    environment = os.environ | {"NSA_MODEL": str(tiny_checkpoint), "NSA_CACHE_DIR": str(tmp_path / "s"), "TERM": "dumb"}
    command = [sys.executable, "-m", "nsa_cli", "chat", text, *map(str, SHORT)]
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=subprocess.PIPE, env=environment) as process:
        os.close(child)
        os.write(parent, b"who runs?\n/quit\n")
        err = process.stderr.read().decode()
    assert process.returncode == 0, err
    assert b"> " in os.read(parent, 10_000) and "tokens read; /undo takes" in err


def test_ctrl_d_ends_it(monkeypatch):
    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert list(typed_lines()) == []
