"""Source code without its comments and empty lines."""

from dataclasses import replace

from nsa_cli.documents.document import Document
from nsa_cli.documents.tags import find_comments


def bare(document: Document) -> Document:
    """At level `code`: the lines that are left, with their numbers. Itself where it is in no language that is known."""
    comments = find_comments(document.text, document.path)
    if comments is None:
        return document
    data = bytearray(document.text.encode("utf-8", "replace"))
    for start, stop in sorted(comments, reverse=True):
        data[start:stop] = b"\n" * data.count(b"\n", start, stop) or b" "
    lines = data.decode().split("\n")
    left = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not left:
        return replace(document, level="name")
    text = "".join(lines[number - 1].rstrip() + "\n" for number in left)
    return replace(document, text=text, lines=tuple(left), level="code")
