"""Where chapters begin, and that they leave nothing out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.chapters import chapters

BODY = "It was a long day, and much was said about the lamp and the boat before anyone went to sleep. " * 3


def titles(text: str, path: str = "book.txt") -> list[str]:
    return [chapter.title for chapter in chapters(text, path)]


def book(*headings: str, between: str = "\n\n") -> str:
    return "".join(f"{heading}{between}{BODY}\n\n" for heading in headings)


@pytest.mark.parametrize(
    "headings",
    [
        ["CHAPTER I", "CHAPTER II", "CHAPTER III"],
        ["Chapter 1. The Lamp", "Chapter 2. The Boat"],
        ["Letter One", "Letter Two"],
        ["PREFACE", "Chapter the First", "Epilogue"],
        ["I", "II.", "III"],
        ["Kapitel 1", "Kapitel 2"],
    ],
)
def test_headings_of_plain_books(headings):
    assert titles(book(*headings)) == headings


def test_a_title_below_its_number_belongs_to_it():
    assert titles(book("CHAPTER I\nThe Lamp", "CHAPTER II\n\nThe Boat")) == [
        "CHAPTER I The Lamp",
        "CHAPTER II The Boat",
    ]


def test_a_table_of_contents_is_no_chapter_and_what_comes_before_the_first_is_the_beginning():
    contents = "CONTENTS\n\nCHAPTER I\n\nCHAPTER II\n\n"
    text = f"THE LAMP\n\n{BODY}\n\n{contents}" + book("CHAPTER I", "CHAPTER II")
    assert titles(text) == ["beginning", "CHAPTER I", "CHAPTER II"]
    assert titles(contents + book("CHAPTER I", "CHAPTER II")) == ["CHAPTER I", "CHAPTER II"]


def test_markdown_takes_the_topmost_level_that_repeats_and_no_code():
    text = f"# Book\n\n## One\n\n{BODY}\n\n### Detail\n\n{BODY}\n\n```sh\n## no heading\n```\n\n## Two ##\n\n{BODY}\n"
    assert titles(text, "b.md") == ["One", "Two"]
    assert titles(text, "b.txt") == ["b.txt"]


@pytest.mark.parametrize("text", ["", "\n", "CHAPTER I\n\n" + BODY, "I am here\n\nPart of it\n\n", "x\n" * 500])
def test_without_headings_a_text_is_one_chapter(text):
    (whole,) = chapters(text, "a.txt")
    assert (whole.title, whole.start, whole.stop, whole.first_line) == ("a.txt", 0, len(text), 1)


LINES = st.sampled_from(
    ["CHAPTER I\n", "# A\n", "## B\n", "II\n", "\n", BODY + "\n", "```\n", "x\f y\u2028z\r\n", "Part Two\n"]
)


@given(st.lists(LINES, max_size=25).map("".join), st.sampled_from(["a.txt", "a.md"]))
def test_chapters_follow_each_other_and_start_at_their_lines(text, path):
    found = chapters(text, path)
    assert found[0].start == 0 and found[-1].stop == len(text)
    assert all(a.stop == b.start for a, b in zip(found, found[1:], strict=False))
    for chapter in found:
        assert chapter.first_line == 1 + text[: chapter.start].count("\n")
        assert chapter.start == 0 or text[chapter.start - 1] == "\n"
