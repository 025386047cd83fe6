"""Quotes and references in an answer, looked up in the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.citations import check_citations, texts_in
from nsa_cli.context import build_context
from nsa_cli.documents import Document
from nsa_models import load_tokenizer

TEXT = "The harbour was closed.\nAda Brill’s lamp — the great\none — went out at “dusk”.\nNobody came.\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def context(tokenizer):
    return build_context([Document("log/day.txt", TEXT), Document("src/a.py", "x = 1\ny = 2\n")], tokenizer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('It says "the harbour was closed".', ("similar", "log/day.txt", 1, 1)),
        ('It says "The harbour was closed."', ("verbatim", "log/day.txt", 1, 1)),
        ("It says “the great one — went out”.", ("verbatim", "log/day.txt", 2, 3)),
        ("It says «Ada Brill's lamp - the great», yes", ("similar", "log/day.txt", 2, 2)),
        ("It says \"went out at 'dusk'. Nobody\"", ("repaired", "log/day.txt", 3, 4)),
        ("> Nobody came.\n> x = 1", ("missing", None, None, None)),
        ("> The harbour\n> was closed.\n", ("verbatim", "log/day.txt", 1, 1)),
        ('It says "the harbour was open".', ("missing", None, None, None)),
        ("See log/day.txt:2-4.", ("exists", "log/day.txt", 2, 4)),
        ("See ./src/a.py:2", ("exists", "src/a.py", 2, 2)),
        ("See day.txt:1", ("exists", "log/day.txt", 1, 1)),
        ("See src/a.py:3", ("missing", None, None, None)),
        ("See src/b.py:1", ("missing", None, None, None)),
        ("See log/day.txt:3-2", ("missing", None, None, None)),
    ],
)
def test_what_is_found_and_where(context, answer, expected):
    (found,) = check_citations(answer, context)
    assert (found.status, found.path, found.start, found.end) == expected
    assert found.found == (found.status in ("verbatim", "similar", "exists"))
    assert found.path or "not in the text" in str(found)


@pytest.mark.parametrize(
    ("answer", "missing"),
    [
        ("src/lamp.py defines lamp.", ["src/lamp.py"]),
        ("`./src/lamp.py` and (log/night.txt), not src/a.py", ["./src/lamp.py", "log/night.txt"]),
        ("src/a.py, ./src/a.py, harbour/src/a.py, log/day.txt. All of them", []),  # as they stand on somebody's disk
        ("src/a.py:1 and src/lamp.py:1", ["src/lamp.py:1"]),  # once, with its line
        ("docs/plan.md names tests/a.py, and lib/x.c is only listed", []),  # the text says these, the listing that
        ("https://a.org/src/lamp.py, a/b, e.g./i.e., and/or, 1.5/2.5, lamp.py, and/or.", []),
    ],
)
def test_files_that_are_not_there(tokenizer, answer, missing):
    documents = [
        *(Document("log/day.txt", TEXT), Document("src/a.py", "x = 1\n"), Document("docs/plan.md", "tests/a.py\n")),
        Document("lib/x.c", "1\n", level="name"),
    ]
    context = build_context(documents, tokenizer)
    found = [citation for citation in check_citations(answer, context) if not citation.found]
    assert [citation.text for citation in found] == missing
    assert all(str(c) == f"{c.text}  is not in the text" and c.kind == "reference" for c in found)
    for shard in context.split(150):  # one knows what is in the others
        assert shard is not context and not check_citations("src/a.py, log/day.txt and lib/x.c", shard)


@pytest.mark.parametrize(
    "answer", ["", 'a "name" and "two words"', "at 12:30", "http://a.b:80/", "a.py", '"' * 7, "1.5:2"]
)
def test_what_quotes_nothing(context, answer):
    assert check_citations(answer, context) == []


@pytest.mark.parametrize(
    ("quote", "repaired"),
    [
        ("Ada Brill’s lamp, the great one, went off", "Ada Brill’s lamp — the great one — went"),
        ("Ada Brill’s lamp, a great one, went off", None),  # 6 of 8 words
        ("Ada Brill’s big lamp — the great one — went out", "Ada Brill’s lamp — the great one — went out"),
        ("Ada's lamp — the great one — went out at “dusk”.", "lamp — the great one — went out at “dusk”."),
        ("the harbour was shut. Ada Brill's lamp", "The harbour was closed. Ada Brill’s lamp"),
        ("lamp Brill’s Ada — one great the — out went", None),
    ],
)
def test_a_quote_with_other_words_is_repaired(context, quote, repaired):
    (found,) = check_citations(f"“{quote}”" if "“" not in quote else f"> {quote}", context)
    assert (found.status, found.repaired) == ("repaired" if repaired else "missing", repaired)
    assert not found.found and (not repaired or f'says "{repaired}", not "{quote}"' in str(found))


@given(st.integers(0, 30), st.integers(10, 20), st.data())
def test_a_long_quote_with_one_wrong_word_is_repaired_where_it_stands(tokenizer_text, start, length, data):
    context, words = tokenizer_text
    quote = words[start : start + length]
    at = data.draw(st.integers(1, length - 2))
    said = " ".join([*quote[:at], "zebra", *quote[at + data.draw(st.integers(0, 1)) :]])
    (found,) = check_citations(f'"{said}"', context)
    assert (found.status, found.repaired) == ("repaired", " ".join(quote))


@pytest.fixture(scope="module")
def tokenizer_text(tokenizer):
    words = [f"w{i * 7919 % 97}x{i}" for i in range(60)]
    return build_context([Document("a.txt", "\n".join(words) + "\n")], tokenizer), words


def test_citations_come_in_the_answers_order(context):
    found = check_citations('src/a.py:1 says "Nobody came", and src/a.py:2 too', context)
    assert [c.text for c in found] == ["src/a.py:1", "Nobody came", "src/a.py:2"][::2]  # two words are no quote


@given(st.integers(0, len(TEXT) - 1), st.integers(1, 60))
def test_every_stretch_of_the_text_is_found_where_it_stands(context, start, length):
    quote = TEXT[start : start + length].strip()
    if len(quote.split()) < 3 or any(mark in quote for mark in "“”"):
        return
    (found,) = check_citations(f"“{quote}”", context)
    first = 1 + TEXT[: TEXT.index(quote.strip(" .,\n"))].count("\n")
    assert found.status == "verbatim" and found.start <= first <= found.end


@given(st.text('ab "“”«»>:.-\n1/', max_size=80))
def test_any_answer_is_read_without_an_error(context, answer):
    for citation in check_citations(answer, context):
        assert citation.to_json()["kind"] in ("quote", "reference") and "\n" not in str(citation)


def test_a_long_document_in_parts_keeps_its_lines(tokenizer):
    text = "".join(f"this is line number {i} of many\n" for i in range(1, 200))
    context = build_context([Document("long.txt", text)], tokenizer)
    for shard in context.split(context.tokens // 3):
        middle = shard.files[0].first_line
        (found,) = check_citations(f'"this is line number {middle} of many"', shard)
        assert (found.path, found.start) == ("long.txt", middle)
        assert check_citations(f"long.txt:{middle}", shard)[0].found


def test_texts_of_a_json_value():
    assert texts_in({"a": ["x y", 1, {"b": "z"}], "c": None}) == "x y\n\nz"


def test_strict_fails_where_the_text_does_not_hold_a_quote(nsa, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three four\n")
    for said, code in (('"one two three"', 0), ('"one three two"', 6), ("nothing", 0)):

        def generate(checkpoint, cache, logits, request, tell, named, said=said):
            tell(said)
            return said, [1], "stop", 0.0

        monkeypatch.setattr("nsa_cli.conversation.generate", generate)
        run = nsa("ask", tmp_path / "a.txt", "what?", "--strict")
        assert (run.code, run.out) == (code, said + "\n"), run.err
        assert ("1 of 1 citations are not in the text: one three two" in run.err) == (code == 6)
        assert nsa("ask", tmp_path / "a.txt", "what?").code == 0
