"""Passages: whole lines around the blocks that a question leads to, as many as fit; the answer comes from them."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.answer import answer
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.context import build_context
from nsa_cli.documents import Document
from nsa_cli.evidence import counted_tokens
from nsa_cli.output import silent
from nsa_cli.request import Request
from nsa_cli.reread import AFTER, BEFORE, CLOSE, around, by_mass, closing_bracket, cut, merge, named_paths, passages
from nsa_models import Cache, decode, prefill
from nsa_models.sampling import Sampling
from tests.nsa_cli.test_evidence import BLOCK, LINES, context_of, mass_of

HEADER = len("=== a.txt ===\n")
START = 2 * BLOCK - HEADER  # tokens before the context, so that lines of 32 tokens start where a block does


def numbered(count: int) -> str:
    return "".join(f"{i:031}\n" for i in range(1, count + 1))


def test_a_passage_is_the_lines_around_a_block():
    context = context_of(numbered(60))
    (found,) = passages(mass_of(32, {9: 90}), context, START, 1000)
    first = (9 - 2) * 2 + 1  # of the block's two lines; two blocks come before the text
    assert found.first_line == first - BEFORE // 32
    assert found.text == "".join(f"{i:031}\n" for i in range(first - BEFORE // 32, first + 2 + AFTER // 32))
    assert "".join(map(chr, found.header)) == f"=== a.txt (from line {found.first_line}) ===\n"


def test_the_best_that_fit_the_very_best_last():
    context = context_of(numbered(200))
    mass = mass_of(100, {9: 90, 40: 50, 70: 80})
    one = sum(part.tokens for part in passages(mass, context, START, 300))
    assert one <= 300
    for limit, blocks in ((0, []), (300, [9]), (2 * one + 20, [70, 9]), (4 * one, [40, 70, 9])):
        found = passages(mass, context, START, limit)
        assert [part.first_line for part in found] == [(block - 2) * 2 + 1 - BEFORE // 32 for block in blocks]
        assert sum(part.tokens for part in found) <= limit


def test_neighbours_are_one_passage_and_files_are_kept_apart():
    context = context_of(LINES * 8, LINES * 8)
    block = context.files[0].stop // BLOCK
    found = passages(mass_of(12, {block: 90, block - 1: 80}), context, 0, 10_000)
    assert [part.path for part in found] == ["a.txt", "b.txt"]
    assert found[0].text.count("\n") + found[0].first_line - 1 == 8 and found[1].first_line == 1


def test_a_signature_is_not_cut_off():
    """A passage goes on to the line where brackets close, if that is near."""
    lines = [f"    argument_{i}: int = {i},\n" for i in range(3)]
    text = "x" * 63 + "\n" + "def long_one(\n" + "{}" + ") -> int:\n" + "    return 1\n" * 40
    for count, closes in ((3, True), (9, False)):
        between = "".join(lines[i % 3] for i in range(count))
        context = context_of(text.format(between))
        at = context.ids.index(ord("d"), HEADER)
        (found,) = cut(context, around([(at - 32, at)], context, 1000))
        assert found.text.endswith(") -> int:\n") == closes and found.tokens <= HEADER + 32 + BEFORE + AFTER + CLOSE


@given(st.text("ab\n()[]{}", max_size=60), st.integers(0, 60), st.integers(0, 60))
def test_where_brackets_close(text, start, stop):
    """Of one kind as of another, and those alone that open in the passage: what closes before counts for nothing."""
    start, stop = min(start, stop, len(text)), min(max(start, stop), len(text))
    at = closing_bracket(text, start, stop, len(text))
    depths = [0]
    for c in text[start:]:
        depths.append(max(depths[-1] + (1 if c in "([{" else -1 if c in ")]}" else 0), 0))
    after = depths[stop - start :]
    assert (at is None) == (after[0] == 0 or 0 not in after)
    if at is not None:
        assert at == stop + after.index(0) - 1 and text[at] in ")]}"


def test_nothing_stands_out():
    assert passages(mass_of(32, {}), context_of(LINES * 60), START, 1000) == []


@given(
    st.lists(st.text(st.sampled_from("ab \n"), max_size=400), min_size=1, max_size=3),
    st.dictionaries(st.integers(1, 19), st.integers(30, 90), max_size=4),
    st.integers(0, 600),
    st.integers(0, 200),
)
def test_passages_hold_their_blocks_and_are_of_the_text(texts, drawn, limit, offset):
    """Long lines, empty files, blocks that lie outside of the text: never more than the limit, nothing twice."""
    context = context_of(*texts)
    found = passages(mass_of(20, drawn), context, offset, limit)
    assert sum(part.tokens for part in found) <= limit
    spans = []
    for part in found:
        (file,) = (file for file in context.files if file.path == part.path)
        assert part.text in file.text or part.text == file.text[-len(part.text) + 1 :] + "\n"
        spans.append((part.path, part.first_line))
    assert len(set(spans)) == len(spans)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(0, 5))
def test_passages_by_the_mass_of_their_tokens(drawn, offset):
    """The most last; those that drew as much stay as they are. What stands before and behind them counts for none."""
    parts = context_of("x" * 20, "y" * 40, "z" * 30).files[: len(drawn)]
    mass = torch.full((offset + sum(part.tokens for part in parts) + 7,), 9.0)
    at = offset
    for part, here in zip(parts, drawn, strict=True):
        mass[at : at + part.tokens] = 0
        mass[at + here] = here  # one token of each draws it all
        at += part.tokens
    found = by_mass(parts, mass, offset)
    assert [part.path for part in found] == [
        part.path for _, part in sorted(zip(drawn, parts, strict=True), key=lambda pair: pair[0])
    ]


def test_spans_that_touch_are_one():
    assert merge([(5, 9), (0, 2), (9, 12), (3, 3), (6, 7)]) == [(0, 2), (5, 12)]


@pytest.fixture
def book(tmp_path):
    """A text in which one word is rare."""
    lines = ["it was on the table, and then it was on the chair\n"] * 300
    lines[200] = "zebra quagga zebra quagga zebra quagga\n"
    (tmp_path / "book.txt").write_text("".join(lines))
    return tmp_path / "book.txt"


def asked(nsa, *args):
    run = nsa("ask", *args, "zebra quagga?", "--max-tokens", 6, "--json")
    assert run.code == 0, run.err
    return json.loads(run.out)


def test_an_answer_from_passages(nsa, book, tiny_checkpoint):
    """The text is read and stored, and its evidence found, as without; only the second prompt is counted beside it."""
    whole, again = asked(nsa, book), asked(nsa, book, "--reread", 500)
    assert whole["usage"]["reread_tokens"] == 0 and 0 < again["usage"]["reread_tokens"] < 600
    assert whole["evidence"] == again["evidence"] != []
    assert again["usage"]["cached_tokens"] > 0
    usage = again["usage"] | {"reread_tokens": 0, "cached_tokens": 0}
    assert usage == whole["usage"] | {"cached_tokens": 0}
    assert asked(nsa, book, "--reread", 500)["answer"] == again["answer"]


def test_too_few_tokens_for_a_passage(nsa, book):
    run = nsa("ask", book, "zebra quagga?", "--max-tokens", 6, "--reread", 20)
    assert run.code == 0 and "--reread 20 holds no passage: the answer comes from all of the text" in run.err
    assert "again" not in run.err


def test_a_text_that_is_short_enough_is_read_once(nsa, book):
    book.write_text("zebra quagga\n" * 3)
    assert asked(nsa, book, "--reread", 500)["usage"]["reread_tokens"] == 0


def test_the_checkpoint_says_how_much(nsa, book, tiny_checkpoint, tmp_path):
    made = shutil.copytree(tiny_checkpoint, tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"reread": 500}))
    assert asked(nsa, book, "--model", made)["usage"]["reread_tokens"] > 0
    assert asked(nsa, book, "--model", made, "--reread", 0)["usage"]["reread_tokens"] == 0
    for command in (["summarize", book], ["run", "explain-repo", book]):
        run = nsa(*command, "--model", made, "--max-tokens", 4, "--json")
        assert run.code in (0, 6) and json.loads(run.out)["usage"]["reread_tokens"] == 0
    (made / "config.json").write_text(json.dumps(config | {"reread": -1}))
    run = nsa("ask", book, "who?", "--model", made)
    assert run.code == 5 and "reread must be at least 0" in run.err


def test_a_conversation_goes_on_from_its_passages(nsa, book, tiny_checkpoint, monkeypatch):
    """The second prompt holds passages, the first question and its answer, and the second question, in this order."""
    from nsa_cli import conversation
    from nsa_models import load_tokenizer

    prompts: list[list[int]] = []
    read_again = conversation.read_again
    monkeypatch.setattr(
        conversation, "read_again", lambda c, ids, *args: prompts.append(ids) or read_again(c, ids, *args)
    )
    run = nsa("chat", book, "--reread", 400, "--max-tokens", 5, "--json", stdin="zebra quagga?\nand quagga?\n")
    assert run.code == 0, run.err
    first, second = (json.loads(line) for line in run.out.splitlines())
    assert [len(prompt) for prompt in prompts] == [r["usage"]["reread_tokens"] for r in (first, second)]
    text = load_tokenizer(tiny_checkpoint).decode(prompts[1])
    places = [text.find(part) for part in ("it was on", "zebra quagga?", first["answer"], "and quagga?")]
    assert places == sorted(places) and places[0] > 0


def test_passages_are_read_in_the_order_that_their_reading_gives(book, tiny_checkpoint, tmp_path, monkeypatch):
    """Read once where the heads agree with the whole text's, else once more, and the answer is that of the last."""
    from nsa_cli import conversation as module

    made = shutil.copytree(tiny_checkpoint, tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"reread_heads": [[1, 1]]}))
    checkpoint = Checkpoint(str(made))
    lines = book.read_text().splitlines(keepends=True)
    lines[40] = "quagga and a zebra\n"
    context = build_context([Document("book.txt", "".join(lines))], checkpoint.tokenizer)
    request = Request(Sampling(max_tokens=5), store="off", reread=500)
    prompts: list[list[int]] = []
    read_again = module.read_again

    def reading(checkpoint, ids, around, longest):
        cache, logits, mass = read_again(checkpoint, ids, around, longest)
        counted = sum(counted_tokens("zebra quagga?", checkpoint.tokenizer.encode_with_offsets("zebra quagga?")[1]))
        assert mass.shape == (len(ids) - len(around.after),) and mass[0] == 0 < mass.sum() < counted + 1e-6
        prompts.append(ids)
        return cache, logits, mass

    monkeypatch.setattr(module, "read_again", reading)
    answers = []
    for order in (lambda parts, *_: list(parts), lambda parts, *_: parts[::-1]):
        monkeypatch.setattr(module, "by_mass", order)
        answers.append(answer(checkpoint, context, "zebra quagga?", request, silent))
    one, two, three = prompts
    assert one == two != three and sorted(two) == sorted(three)
    assert [reply.usage.reread_tokens for reply in answers] == [len(one), 2 * len(one)]
    model, text = checkpoint.model, checkpoint.tokenizer
    for prompt, reply in ((one, answers[0]), (three, answers[1])):
        cache = Cache.for_model(model, len(prompt) + 5)
        ids = list(decode(model, cache, prefill(model, prompt, cache), request.sampling, eos_ids=text.eos_ids))
        assert reply.text == text.decode(ids).lstrip()


def test_the_paths_that_passages_know():
    context = context_of("see src/b.py, doc/x.md and and/or.\n", "", "", folder="src")
    known = {"src/a.txt", "src/b.txt", "src/c.txt", "src/b.py"}
    assert named_paths(context.files, "Is ./src/new.py, or lib/y.py, in src/sub/?") == {*known, "src/new.py", "src/sub"}
    assert named_paths(context_of("src/b.py").files, "a/b?") == {"a.txt"}


def test_an_answer_from_passages_makes_no_path_up(book, tiny_checkpoint, monkeypatch):
    """In the folders of the passages: whatever else the model would say of them is not allowed."""
    import nsa_models

    checkpoint, asked = Checkpoint(str(tiny_checkpoint)), []
    monkeypatch.setattr(nsa_models, "decode", lambda *args, constraint, **kwargs: asked.append(constraint) or iter(()))

    def may_say(document: str, reread: int, text: str) -> bool:
        context = build_context([Document(document, book.read_text())], checkpoint.tokenizer)
        request = Request(Sampling(max_tokens=5), store="off", reread=reread)
        answer(checkpoint, context, "zebra quagga src/new.txt?", request, silent)
        constraint, size = asked.pop(), checkpoint.config.vocab_size
        for token in checkpoint.tokenizer.encode(text) if constraint else ():
            if not constraint.mask(torch.zeros(size))[token].isfinite():
                return False
            constraint.advance(token)
        return True

    for said in ("src/book.txt", "src/new.txt", "lib/none.txt"):
        assert may_say("src/book.txt", 500, said)
    assert not may_say("src/book.txt", 500, "src/none.txt")
    assert may_say("src/book.txt", 0, "src/none.txt") and may_say("book.txt", 500, "src/none.txt")
