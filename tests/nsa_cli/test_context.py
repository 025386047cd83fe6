"""Documents -> context: exact counts, lines of token ranges, parts that fit, and what to leave out."""

import re
from itertools import accumulate
from types import SimpleNamespace

import click
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_cli import context as module
from nsa_cli.context import Context, Place, build_context, check_budget, parse_tokens
from nsa_cli.documents import Document, Skip
from nsa_models.errors import BudgetError


class Words:
    """Tokens as byte-level BPE makes them: words with their space, runs of white space, else single bytes."""

    def __init__(self) -> None:
        self.table: dict[bytes, int] = {}

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        ids, offsets = [], []
        for match in re.finditer(r" ?[a-z]+|\s+|.", text, re.DOTALL):
            pieces = [match[0].encode()] if match[0].isascii() else [bytes([b]) for b in match[0].encode()]
            ids += [self.table.setdefault(piece, len(self.table)) for piece in pieces]
            offsets += [match.start()] * len(pieces)
        return ids, offsets

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def decode(self, ids: list[int]) -> str:
        names = list(self.table)
        return b"".join(names[i] for i in ids).decode()


WORDS = Words()
TEXTS = st.lists(st.sampled_from(["a", "word", " word", "\n", "\n\n", "    ", "é", "😀", "== x", "<|im_end|>"])).map(
    "".join
)
DOCUMENTS = st.lists(TEXTS.filter(str.strip), min_size=1, max_size=5).map(
    lambda texts: [Document(f"d{i // 2}/f{i}.txt", text) for i, text in enumerate(texts)]
)


def with_line_end(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def test_layout() -> None:
    context = build_context([Document("a.py", "one\ntwo"), Document("s/b.py", "three\n")], WORDS, [Skip("c", "binary")])
    assert WORDS.decode(context.ids) == ("Files:\na.py\ns/b.py\n\n=== a.py ===\none\ntwo\n=== s/b.py ===\nthree\n")
    assert context.skips == [Skip("c", "binary")]
    single = build_context([Document("a.py", "one\ntwo")], WORDS)
    assert WORDS.decode(single.ids) == "=== a.py ===\none\ntwo\n"


def test_tokens_of_a_file_do_not_depend_on_its_neighbours() -> None:
    a, b = Document("a", "x\n"), Document("b", "\n\n y\n")
    together, alone = build_context([a, b], WORDS), build_context([b], WORDS)
    file = together.files[1]
    assert together.ids[file.start : file.stop] == alone.ids
    assert file.tokens == alone.tokens == len(alone.ids)


@given(DOCUMENTS)
def test_counts_are_exact(documents: list[Document]) -> None:
    context = build_context(documents, WORDS)
    assert context.tokens == len(context.ids)
    assert [f.path for f in context.files] == [d.path for d in documents]
    borders = [len(context.listing), *(f.stop for f in context.files)]
    assert [f.start for f in context.files] == borders[:-1]
    assert borders == list(accumulate([len(context.listing), *(f.tokens for f in context.files)]))


def check_locate(context: Context, texts: dict[str, str]) -> None:
    """Every token range maps to the lines of the characters its tokens hold: here, token by token from the bytes."""
    names = list(WORDS.table)
    for file in context.files:
        line = file.first_line
        token_lines = [(line, line)] * len(file.header)
        for token in file.body:
            ends = names[token].count(b"\n")
            # A trailing line end belongs to the line that it ends.
            token_lines.append((line, line + max(ends - names[token].endswith(b"\n"), 0)))
            line += ends
        for i, (first, last) in enumerate(token_lines):
            assert context.locate(file.start + i, file.start + i + 1) == [Place(file.path, first, last)]
        assert context.locate(file.start, file.stop) == [Place(file.path, file.first_line, token_lines[-1][1])]
        assert token_lines[-1][1] <= with_line_end(texts[file.path]).count("\n")


@given(DOCUMENTS)
@example([Document("a", "\n\n\nx\n\n    y")])
@example([Document("a", "é\n😀\né")])
def test_locate_names_the_lines_of_every_token(documents: list[Document]) -> None:
    context = build_context(documents, WORDS)
    check_locate(context, {d.path: d.text for d in documents})
    everything = context.locate(0, context.tokens)
    assert everything == [Place(d.path, 1, with_line_end(d.text).count("\n")) for d in documents]
    assert context.locate(0, len(context.listing)) == []
    assert context.locate(3, 3) == []


@settings(deadline=None)
@given(DOCUMENTS, st.integers(45, 90))
@example([Document("long", "word " * 200)], 45)
@example([Document("bytes", "😀" * 60)], 45)
def test_split_covers_everything_in_parts_that_fit(documents: list[Document], max_tokens: int) -> None:
    context = build_context(documents, WORDS)
    shards = context.split(max_tokens)
    assert all(len(shard.ids) == shard.tokens <= max_tokens for shard in shards)
    texts = {d.path: d.text for d in documents}
    for shard in shards:
        check_locate(shard, texts)
    parts = [file for shard in shards for file in shard.files]
    for document in documents:
        mine = [part for part in parts if part.path == document.path]
        joined, line = "", 1
        for part in mine:
            assert part.first_line == line
            inside_a_line = part is not mine[-1] and not document.text.startswith(joined + part.text)
            joined += part.text[:-1] if inside_a_line else part.text
            line = joined.count("\n") + 1
            if inside_a_line:  # only where the line alone is too long
                assert "\n" not in part.text[:-1]
        assert joined == with_line_end(document.text)
    if len(shards) > 1:  # a part starts a shard only where the shard before had no room for it
        for before, after in zip(shards, shards[1:], strict=False):
            assert before.tokens + after.files[0].tokens > max_tokens


def test_split_breaks_between_files_and_names_continuations() -> None:
    documents = [Document("a", "x\n" * 10), Document("b", "y\n" * 60), Document("c", "z\n")]
    shards = build_context(documents, WORDS).split(50)
    assert [[(f.path, f.first_line) for f in shard.files] for shard in shards] == [
        [("a", 1)],
        [("b", 1)],
        [("b", 21)],
        [("b", 37)],
        [("b", 53), ("c", 1)],
    ]
    assert WORDS.decode(shards[2].ids).startswith("=== b (from line 21) ===\ny\n")
    whole = build_context(documents, WORDS)
    assert whole.split(whole.tokens) == [whole]


def test_split_refuses_what_no_part_can_hold() -> None:
    with pytest.raises(BudgetError, match="5 tokens do not hold a part of some/path.txt"):
        build_context([Document("some/path.txt", "x " * 100)], WORDS).split(5)


def test_long_texts_are_encoded_in_blocks_of_lines(monkeypatch) -> None:
    text = "".join(f"line {'x' * (i % 7)}\n" for i in range(200)) + "y" * 100 + "\n\n\nend"
    whole = build_context([Document("a", text)], WORDS)
    monkeypatch.setattr(module, "BLOCK_CHARS", 40)
    encoded = []
    monkeypatch.setattr(Words, "encode_with_offsets", spy(Words.encode_with_offsets, encoded))
    blocks = build_context([Document("a", text)], WORDS)
    assert WORDS.decode(blocks.ids) == WORDS.decode(whole.ids)
    assert len(encoded) > 30
    assert max(map(len, encoded)) < 200
    check_locate(blocks, {"a": text})


def spy(function, seen: list[str]):
    def call(self, text):
        seen.append(text)
        return function(self, text)

    return call


def test_a_budget_that_holds_says_nothing() -> None:
    check_budget(100, 100, [])


@pytest.mark.parametrize(
    "limit, advice",
    [
        (900, "it fits with --exclude src/b.py"),  # 120 tokens: nothing smaller will do
        (800, "it fits with --exclude src"),  # 250, in two files
        (420, "it fits with --exclude tests"),
        (350, "it fits with --exclude tests/a.py --exclude docs/big.md"),
        (150, "it fits with --exclude tests --exclude src"),  # three files do not suffice
        (20, "narrow it with --include, or give --overflow drop, outline or shard"),
    ],
)
def test_an_overrun_says_how_much_and_what_would_fit(limit: int, advice: str) -> None:
    sizes = {"tests/a.py": 550, "tests/b.py": 50, "src/a.py": 130, "src/b.py": 120, "docs/big.md": 150}
    files = [SimpleNamespace(path=path, tokens=tokens) for path, tokens in sizes.items()]
    with pytest.raises(BudgetError) as error:
        check_budget(1000, limit, files)
    message = str(error.value)
    assert f"1,000 tokens are {1000 - limit:,} more than the {limit:,} that fit" in message
    assert "largest: tests/a.py 550, docs/big.md 150, src/a.py 130" in message
    assert message.endswith(advice)
    assert "\n" not in message


def test_advice_can_be_pasted_and_means_only_that_file() -> None:
    files = [SimpleNamespace(path=path, tokens=10) for path in ("app/[id] page.tsx", "app/i page.tsx", "x/y/z")]
    with pytest.raises(BudgetError, match=re.escape(r"--exclude 'app/\[id] page.tsx'")):
        check_budget(30, 20, files)


def test_token_quantities() -> None:
    assert [parse_tokens(text) for text in ("4096", "128k", "128Ki", "1.5M")] == [4096, 128_000, 131_072, 1_500_000]
    for text in ("", "k", "12x", "-5", "0", "1e3"):
        with pytest.raises(click.BadParameter):
            parse_tokens(text)
