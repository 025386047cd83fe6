"""A selection of documents -> one text for other programs: what the model would read, or Markdown, XML, JSON."""

import json
import re
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from nsa_cli.context import listing_text, notes
from nsa_cli.documents import Document, Skip
from nsa_cli.documents.readers import suffix_of
from nsa_cli.reply import SCHEMA_VERSION

HEADER = re.compile(r"^(={3,}) (?!=).* \1$", re.MULTILINE)
FORMATS = ("text", "markdown", "xml", "json")


def export(documents: Sequence[Document], skips: Sequence[Skip], form: str, numbered: bool, listed: bool = True) -> str:
    """`documents` in their order; those of which only the name is wanted stand in the list of files, if `listed`."""
    shown = [(document, body(document, numbered)) for document in documents if document.level != "name"]
    listing = listing_text(documents) if listed and len(documents) > 1 else ""
    return {"text": to_text, "markdown": to_markdown, "xml": to_xml, "json": to_json}[form](listing, shown, skips)


def body(document: Document, numbered: bool) -> str:
    """The text, ending in a line end; each line after its number in the file, if that is wanted."""
    text = document.text if document.text.endswith("\n") else document.text + "\n"
    if not numbered:
        return text
    lines = text.split("\n")[:-1]
    numbers = document.lines or tuple(range(1, len(lines) + 1))
    width = len(str(numbers[-1]))
    return "".join(f"{number:{width}}  {line}\n" for number, line in zip(numbers, lines, strict=True))


def name_of(document: Document) -> str:
    return document.path + notes(document, document.begins)


def about(document: Document, text: str) -> dict[str, str | int]:
    """What else to say of it: a language by its usual file ending, and the count of lines."""
    language = "" if document.converted else suffix_of(document.path).removeprefix(".")
    return ({"language": language} if language.isalnum() else {}) | {"lines": text.count("\n")}


def to_text(listing: str, shown: list[tuple[Document, str]], skips: Sequence[Skip]) -> str:
    """What the model reads; but where a line of a text looks like a header, headers have more `=` than it."""
    runs = [len(run) for _, text in shown for run in HEADER.findall(text)]
    fence = "=" * (max(runs, default=2) + 1)
    return listing + "".join(f"{fence} {name_of(document)} {fence}\n{text}" for document, text in shown)


def to_markdown(listing: str, shown: list[tuple[Document, str]], skips: Sequence[Skip]) -> str:
    """A fence is longer than any in the text, so that none closes it."""
    pieces = [fenced(listing, "")] if listing else []
    for document, text in shown:
        language = "" if document.converted else suffix_of(document.path).removeprefix(".")
        pieces.append(f"## {name_of(document)}\n\n{fenced(text, language)}")
    return "\n".join(pieces)


def fenced(text: str, language: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{fence}{language}\n{text}{fence}\n"


def to_xml(listing: str, shown: list[tuple[Document, str]], skips: Sequence[Skip]) -> str:
    """Well-formed: markup in the text is escaped, and characters that XML has no place for are replaced."""
    pieces = [f"<files>\n{xml_text(listing.removeprefix('Files:').strip())}\n</files>\n"] if listing else []
    for document, text in shown:
        level = f' level="{document.level}"' if document.level != "full" else ""
        level += f" from={quoteattr(xml_safe(document.begins))}" if document.begins else ""
        level += "".join(f' {name}="{value}"' for name, value in about(document, text).items())
        pieces.append(f"<document path={quoteattr(xml_safe(document.path))}{level}>\n{xml_text(text)}</document>\n")
    return "<documents>\n" + "".join(pieces) + "</documents>\n"


def xml_text(text: str) -> str:
    return escape(xml_safe(text))


def xml_safe(text: str) -> str:
    return re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def to_json(listing: str, shown: list[tuple[Document, str]], skips: Sequence[Skip]) -> str:
    files = [
        {
            "path": document.path,
            "level": document.level,
            **about(document, text),
            **({"from": document.begins} if document.begins else {}),
            "text": text,
            "parts": [{"line": part.line, "label": part.label} for part in document.parts],
        }
        for document, text in shown
    ]
    skipped = [{"path": skip.path, "reason": skip.reason} for skip in skips]
    return json.dumps({"schema_version": SCHEMA_VERSION, "files": files, "skipped": skipped}, ensure_ascii=False) + "\n"
