"""A document -> the lines that say what is in it: definitions of code, headings of prose, the first row of a table."""

from dataclasses import replace

from nsa_cli.documents.document import Document
from nsa_cli.documents.readers import TABLES, suffix_of
from nsa_cli.documents.tags import find_tags


def outline(document: Document) -> Document | None:
    """The outline, whose lines keep the numbers they have in the file; None where there is nothing to show."""
    numbers = outline_lines(document)
    if not numbers:
        return None
    lines = document.text.split("\n")
    text = "".join(f"{lines[number - 1]}\n" for number in numbers)
    own = document.lines
    return replace(document, text=text, lines=tuple(own[n - 1] if own else n for n in numbers), level="outline")


def outline_lines(document: Document) -> list[int]:
    tags = find_tags(document.text, document.path)
    if tags:
        heads = [range(tag.first_line, tag.last_line + 1) for tag in tags if tag.is_definition]
        return sorted({line for head in heads for line in head})
    if document.parts and not document.lines:
        return [part.line for part in document.parts]
    return [1] if suffix_of(document.path) in TABLES else []
