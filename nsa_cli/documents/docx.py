"""DOCX -> text: headings as Markdown, lists, tables row by row, footnotes at the end."""

from collections.abc import Iterator

from nsa_cli.documents.archive import Archive, local_name, parse_xml
from nsa_cli.documents.document import Extract, NotText, Part

KIND = "DOCX"
DOCUMENT, STYLES = "word/document.xml", "word/styles.xml"
NOTES = ("word/footnotes.xml", "word/endnotes.xml")
# Deleted text, a second rendering of what stands beside it, the properties, and codes of fields.
LEFT_OUT = frozenset(("del", "moveFrom", "Fallback", "rPr", "sectPr", "instrText", "delText", "pict"))
MAX_DEPTH = 200


def read_docx(archive: Archive) -> Extract:
    """Sections as `§ "heading"`."""
    levels = heading_levels(archive) if STYLES in archive.names else {}
    lines: list[str] = []
    parts: list[Part] = []
    for level, text in paragraphs(body(archive, DOCUMENT), levels):
        if level:
            lines += [""] if lines and lines[-1] else []
            parts.append(Part(len(lines) + 1, f'§ "{text}"', level))
            text = "#" * level + " " + text
        lines += text.split("\n")
    for name in (name for name in NOTES if name in archive.names):
        notes = [text for _, text in paragraphs(body(archive, name), {}) if text.strip()]
        lines += ["", "Notes:", *notes] if notes else []
    if not any(line.strip() for line in lines):
        raise NotText("DOCX without text")
    return Extract("\n".join(lines) + "\n", tuple(parts), converted=True)


def body(archive: Archive, name: str):
    root = parse_xml(archive.read(name), name, KIND)
    return next((e for e in root.iter() if local_name(e) == "body"), root)


def heading_levels(archive: Archive) -> dict[str, int]:
    """Style id -> 1..6, for the styles that are named `heading 1` or `Title`."""
    levels = {}
    for style in parse_xml(archive.read(STYLES), STYLES, KIND).iter():
        if local_name(style) != "style":
            continue
        name = next((_value(e) for e in style if local_name(e) == "name"), "").lower()
        if name == "title":
            levels[_attribute(style, "styleId")] = 1
        elif name.startswith("heading ") and name[8:].isdigit():
            levels[_attribute(style, "styleId")] = min(max(int(name[8:]), 1), 6)
    return levels


def paragraphs(element, levels: dict[str, int], depth: int = 0) -> Iterator[tuple[int, str]]:
    """(heading level or 0, text) of paragraphs and of table rows, in order."""
    if depth > MAX_DEPTH:
        raise NotText(f"DOCX nested over {MAX_DEPTH} deep")
    for child in element:
        name = local_name(child)
        if name == "p":
            text = run_text(child)
            style = next((_value(e) for e in child.iter() if local_name(e) == "pStyle"), "")
            listed = any(local_name(e) == "numPr" for e in child.iter())
            level = levels.get(style, 0) if text.strip() else 0
            text = " ".join(text.split()) if level else text.rstrip()
            yield level, f"- {text}" if listed and text and not level else text
        elif name == "tr":
            cells = (" ".join(t for _, t in paragraphs(cell, {}, depth + 1) if t) for cell in child)
            yield 0, " | ".join(cell for cell in cells if cell)
        elif name not in LEFT_OUT:
            yield from paragraphs(child, levels, depth + 1)


def run_text(paragraph) -> str:
    pieces, stack = [], [iter(paragraph)]
    while stack:
        child = next(stack[-1], None)
        if child is None:
            stack.pop()
            continue
        name = local_name(child)
        if name == "t":
            pieces.append(child.text or "")
        elif name in ("tab", "br", "cr"):
            pieces.append("\t" if name == "tab" else "\n")
        elif name == "noBreakHyphen":
            pieces.append("-")
        elif name not in LEFT_OUT and name != "pPr":
            stack.append(iter(child))
    return "".join(pieces)


def _value(element) -> str:
    return _attribute(element, "val")


def _attribute(element, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")
