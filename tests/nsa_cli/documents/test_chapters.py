"""Where chapters begin, and that they leave nothing out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.documents import ReadOptions
from nsa_cli.documents.chapters import book_parts, chapters
from nsa_cli.documents.readers import extract

BODY = "It was a long day, and much was said about the lamp and the boat before anyone went to sleep. " * 3


def cut(text: str, path: str = "book.txt"):
    found = extract(text.encode(), path, ReadOptions())
    return found.text, chapters(found.text, found.parts, path)


def titles(text: str, path: str = "book.txt") -> list[str]:
    return [chapter.title for chapter in cut(text, path)[1]]


def book(*headings: str) -> str:
    return "".join(f"{heading}\n\n{BODY}\n\n" for heading in headings)


@pytest.mark.parametrize(
    "headings, expected",
    [
        (["CHAPTER I", "CHAPTER II", "CHAPTER III"], ["ch. 1", "ch. 2", "ch. 3"]),
        (["Chapter 1. The Lamp", "Chapter 2: The Boat"], ['ch. 1 "The Lamp"', 'ch. 2 "The Boat"']),
        (["Chapter Nineteen", "Chapter Twenty-One", "CHAPTER XLIV"], ["ch. 19", "ch. 21", "ch. 44"]),
        (["Letter One", "Letter Two"], ["letter 1", "letter 2"]),
        (
            ["PREFACE", "Chapter the First", "Chapter the Last", "Epilogue"],
            ['"PREFACE"', "ch. 1", "ch. last", '"Epilogue"'],
        ),
        (["I", "II.", "III"], ["ch. 1", "ch. 2", "ch. 3"]),
        (["Kapitel 1", "Chapitre 2", "Capítulo III"], ["ch. 1", "ch. 2", "ch. 3"]),
        (
            ["PART ONE\n\nChapter 1", "Chapter 2", "PART TWO: Home\n\nChapter 1"],
            ["part 1 ch. 1", "part 1 ch. 2", 'part 2 "Home" ch. 1'],
        ),
        (["ACT I. Scene 1", "ACT II"], ['act 1 "Scene 1"', "act 2"]),
        (["CHAPTER I\nThe Lamp", "CHAPTER II\n\nThe Boat"], ['ch. 1 "The Lamp"', 'ch. 2 "The Boat"']),
    ],
)
def test_headings_of_plain_books(headings, expected):
    assert titles(book(*headings)) == expected


@pytest.mark.parametrize(
    "line",
    [
        "Chapter 3 says otherwise.",
        "chapter one",
        "Part of it was gone",
        "Section by section, they went on",
        "I am here",
        "Chapter 1 " + "and so on " * 9,
        "Chapter 5 is quoted by\nwhat is a paragraph\nof several\nlines",
    ],
)
def test_sentences_are_no_headings(line):
    assert book_parts(book(line, line)) == ()


def test_a_table_of_contents_is_no_chapter_and_what_comes_before_the_first_is_the_beginning():
    contents = "CONTENTS\n\nCHAPTER I\n\nCHAPTER II\n\n"
    text = f"THE LAMP\n\n{BODY}\n\n{contents}" + book("CHAPTER I", "CHAPTER II")
    assert titles(text) == ["beginning", "ch. 1", "ch. 2"]
    assert titles(contents + book("CHAPTER I", "CHAPTER II")) == ["ch. 1", "ch. 2"]


def test_markdown_takes_the_topmost_level_that_repeats_and_no_code():
    text = f"# Book\n\n## One\n\n{BODY}\n\n### Detail\n\n{BODY}\n\n```sh\n## no heading\n```\n\n## Two ##\n\n{BODY}\n"
    assert titles(text, "b.md") == ['§ "One"', '§ "Two"']
    assert titles(text, "b.txt") == ["b.txt"]


@pytest.mark.parametrize("text", ["", "\n", "CHAPTER I\n\n" + BODY, "I am here\n\nPart of it\n\n", "x\n" * 500])
def test_without_headings_a_text_is_one_chapter(text):
    _, (whole,) = cut(text, "a.txt")
    assert (whole.title, whole.start, whole.stop, whole.first_line) == ("a.txt", 0, len(text), 1)


LINES = st.sampled_from(
    [
        "CHAPTER I\n",
        "# A\n",
        "## B\n",
        "II\n",
        "\n",
        BODY + "\n",
        "```\n",
        "x\f y\u2028z\r\n",
        "Part Two\n",
        "Preface\n",
    ]
)


@given(st.lists(LINES, max_size=25).map("".join), st.sampled_from(["a.txt", "a.md"]))
def test_chapters_follow_each_other_and_start_at_their_lines(text, path):
    text, found = cut(text, path)
    assert found[0].start == 0 and found[-1].stop == len(text)
    assert all(a.stop == b.start for a, b in zip(found, found[1:], strict=False))
    for chapter in found:
        assert chapter.first_line == 1 + text[: chapter.start].count("\n")
        assert chapter.start == 0 or text[chapter.start - 1] == "\n"
