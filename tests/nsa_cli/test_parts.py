"""A context in parts: nothing is left out, lines stay those of the files, and only what matches is excerpted."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_cli.context import build_context
from nsa_cli.documents import Document, ReadOptions, read_documents
from nsa_cli.parts import excerpts, parts
from nsa_models import load_tokenizer
from nsa_models.errors import InputError
from tests.nsa_cli.documents import make

LINE = st.sampled_from(
    ["CHAPTER I", "CHAPTER II", "## A", "", "the fox jumps over the dog " * 9, "x = 1", "\fform\u2028feed"]
)
TEXT = st.lists(LINE, min_size=1, max_size=12).map(lambda lines: "\n".join(lines) + "\n").filter(str.strip)
DOCUMENTS = st.lists(TEXT, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


def context_of(texts: list[str], tokenizer):
    return build_context([Document(f"{i}.md", text) for i, text in enumerate(texts)], tokenizer)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.sampled_from(["file", "chapter", "shard"]), st.integers(90, 2000))
def test_parts_hold_everything_in_order_and_fit(tokenizer, texts, over, max_tokens):
    context = context_of(texts, tokenizer)
    found = parts(context, over, max_tokens)
    held = [file for part in found for file in part.context.files]
    assert "".join(file.text for file in held) == "".join(file.text for file in context.files)
    assert all(part.context.tokens <= max_tokens for part in found)
    for file in held:  # each line says where it comes from
        lines = texts[int(file.path[0])].split("\n")
        start = sum(len(line) + 1 for line in lines[: file.first_line - 1])
        assert file.text.split("\n")[0] in lines[file.first_line - 1] and start >= 0
    if over == "file" and max_tokens > context.tokens:
        assert [part.label for part in found] == [file.path for file in context.files]


def test_the_document_is_one_part_with_its_list_of_files(tokenizer):
    context = context_of(["a\n", "b\n"], tokenizer)
    (part,) = parts(context, "document", 1)
    assert part.context is context and part.label == ""


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.sampled_from(["fox", "x = 1", "CHAPTER", "^$"]), st.integers(0, 3))
def test_excerpts_are_the_lines_that_match_and_those_around(tokenizer, texts, pattern, around):
    context = context_of(texts, tokenizer)
    wanted = []
    for i, text in enumerate(texts):
        lines = text.split("\n")[:-1]
        near = {
            k for j, line in enumerate(lines) if re.search(pattern, line) for k in range(j - around, j + around + 1)
        }
        wanted += [(f"{i}.md", k + 1, lines[k]) for k in sorted(near) if 0 <= k < len(lines)]
    if not wanted:
        with pytest.raises(InputError, match="no line of"):
            excerpts(context, [pattern], around)
        return
    found = []
    for file in excerpts(context, [pattern], around).files:
        found += [(file.path, file.first_line + k, line) for k, line in enumerate(file.text.split("\n")[:-1])]
    assert found == wanted


def test_an_epubs_own_chapters_are_its_parts(tokenizer, tmp_path):
    pages = {f"c{i}.xhtml": f"<h1>Night {i}</h1><p>{'The lamp went out. ' * 30}</p>" for i in (1, 2, 3)}
    toc = make.ncx([(f"Night {i}", f"c{i}.xhtml") for i in (1, 2, 3)])
    (tmp_path / "lamp.epub").write_bytes(make.epub(pages, toc))
    documents, _ = read_documents([str(tmp_path / "lamp.epub")], ReadOptions())
    context = build_context(documents, tokenizer)
    found = parts(context, "chapter", 10_000)
    assert [part.label.partition(": ")[2] for part in found] == [f'ch. {i} "Night {i}"' for i in (1, 2, 3)]
    assert all(f"Night {i}" in part.context.files[0].text for i, part in enumerate(found, 1))
    assert "".join(part.context.files[0].text for part in found) == context.files[0].text
    (place,) = found[2].context.locate(0, found[2].context.tokens)
    assert 'ch. 3 "Night 3"' in found[2].context.cite(place.path, place.first_line, place.last_line)
