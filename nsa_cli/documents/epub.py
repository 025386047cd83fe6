"""EPUB -> text, chapter by chapter, as its table of contents names them."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple
from urllib.parse import unquote

from nsa_cli.documents import html
from nsa_cli.documents.archive import Archive, local_name, parse_xml, resolve
from nsa_cli.documents.document import Extract, NotText, assemble

KIND = "EPUB"
CONTAINER = "META-INF/container.xml"


class Entry(NamedTuple):
    """A line of the table of contents: where it points, and how deep it is indented."""

    member: str
    fragment: str
    title: str
    depth: int


def read_epub(archive: Archive) -> Extract:
    """Chapters as `ch. 7 "title"`, counted in the order in which the book is read."""
    package_name, package = find_package(archive)
    manifest = {item.get("id"): item for item in package.iter() if local_name(item) == "item" and item.get("href")}
    spine = [
        resolve(package_name, manifest[item.get("idref")].get("href"), KIND)
        for item in package.iter()
        if local_name(item) == "itemref" and item.get("idref") in manifest
    ]
    spine = list(dict.fromkeys(spine))
    extract = assemble(chapters(archive, spine, contents(archive, package_name, package, manifest)))
    if not extract.text:
        raise NotText("EPUB without text")
    return extract


def find_package(archive: Archive):
    container = parse_xml(archive.read(CONTAINER), CONTAINER, KIND)
    for element in container.iter():
        if local_name(element) == "rootfile" and element.get("full-path"):
            name = resolve("", element.get("full-path"), KIND)
            return name, parse_xml(archive.read(name), name, KIND)
    raise NotText("damaged EPUB (it names no package)")


def contents(archive: Archive, package_name: str, package, manifest: dict) -> list[Entry]:
    """What the EPUB 3 navigation, else the EPUB 2 toc.ncx lists, in their order."""
    toc = next((e.get("toc") for e in package.iter() if local_name(e) == "spine"), None)
    navs = [item for item in manifest.values() if "nav" in (item.get("properties") or "").split()]
    ncxs = [i for key, i in manifest.items() if key == toc or i.get("media-type") == "application/x-dtbncx+xml"]
    for item, entries in [(item, nav_entries) for item in navs] + [(item, ncx_entries) for item in ncxs]:
        name = resolve(package_name, item.get("href"), KIND)
        if name in archive.names and (found := list(entries(name, archive.read(name)))):
            return found
    return []


def nav_entries(name: str, data: bytes) -> Iterator[Entry]:
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(data.decode("utf-8", "replace"))
    navs = tree.css("nav")
    toc = [nav for nav in navs if "toc" in (nav.attributes.get("epub:type") or nav.attributes.get("role") or "")]
    for link in (toc or navs)[0].css("a[href]") if navs else ():
        depth, parent = 0, link.parent
        while parent is not None and parent.tag != "nav":
            depth, parent = depth + (parent.tag == "ol"), parent.parent
        yield _entry(name, link.attributes["href"] or "", link.text() or "", depth)


def ncx_entries(name: str, data: bytes) -> Iterator[Entry]:
    pending = [(parse_xml(data, name, KIND), 0)]
    while pending:
        point, depth = pending.pop()
        pending += [(child, depth + (local_name(child) == "navPoint")) for child in reversed(point)]
        if local_name(point) != "navPoint":
            continue
        label = next((e for e in point if local_name(e) == "navLabel"), None)
        target = next((e.get("src") for e in point if local_name(e) == "content"), None)
        if label is not None and target:
            yield _entry(name, target, "".join(label.itertext()), depth)


def _entry(name: str, reference: str, title: str, depth: int) -> Entry:
    return Entry(resolve(name, reference, KIND), unquote(reference.partition("#")[2]), " ".join(title.split()), depth)


def chapters(archive: Archive, spine: list[str], toc: list[Entry]) -> Iterator[tuple[str, str, int]]:
    """(label, text, level). What no entry points at goes on with the chapter before it; what comes first has none."""
    depths = Counter(entry.depth for entry in toc)
    # The outermost level that lists several things: a book may stand as one entry above its chapters.
    top = min((depth for depth, entries in depths.items() if entries > 1), default=0)
    number, label, chapter, level, texts = 0, "", "", 1, []
    for name in spine:
        page = html.parse(archive.read(name).decode("utf-8", "replace"))
        for title, lines in sections(page, [entry for entry in toc if entry.member == name], bool(toc)):
            if title:
                yield label, "\n".join(texts), level
                texts, (text, depth) = [], title
                level = max(depth - top, 0) + 1
                if depth <= top:
                    number += depth == top
                    chapter = label = f'ch. {number} "{text}"' if depth == top else f'"{text}"'
                else:
                    label = f'{chapter} § "{text}"'.strip()
            texts += lines
    yield label, "\n".join(texts), level


def sections(
    page: html.Page, entries: list[Entry], has_toc: bool
) -> Iterator[tuple[tuple[str, int] | None, list[str]]]:
    """A page cut where the contents point into it: ((title, depth), lines). Without contents, its heading names it."""
    if has_toc:
        pointed = [(page.ids.get(e.fragment, 1) if e.fragment else 1, (e.title, e.depth)) for e in entries]
    else:
        pointed = [(line, (title, 0)) for line, level, title in page.headings if level <= 2][:1]
    first: dict[int, tuple[str, int]] = {}
    for line, title in pointed:
        first.setdefault(line, title)
    starts = sorted(first)
    if not starts or starts[0] > 1:
        yield None, page.lines[: starts[0] - 1 if starts else None]
    for start, stop in pairwise([*starts, len(page.lines) + 1]):
        yield first[start], page.lines[start - 1 : stop - 1]
