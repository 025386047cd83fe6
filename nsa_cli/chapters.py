"""Where the chapters of a text begin: Markdown headings, or lines such as `CHAPTER IV. The Ball` in a plain book."""

import re
from collections import Counter
from dataclasses import dataclass
from io import StringIO

MARKDOWN = (".md", ".markdown", ".mdx")
NUMBER = r"(?:\d{1,4}|[IVXLCDM]{1,8}|[ivxlcdm]{1,8}|(?:the\s+)?[a-z]+(?:[- ][a-z]+)?)"
DIVISION = "chapter|book|part|volume|letter|canto|stave|act|scene|section|kapitel|chapitre|cap[ií]tulo|capitolo"
ALONE = "prologue|epilogue|preface|foreword|introduction|afterword|conclusion|appendix"
PLAIN = re.compile(rf"[ \t]*(?:(?:{DIVISION})[ \t]+{NUMBER}\b[^\n]{{0,70}}|(?:{ALONE})[.:]?)[ \t]*", re.IGNORECASE)
BARE = re.compile(rf"(?:{DIVISION})\s+{NUMBER}[.:]?", re.IGNORECASE)  # its title may stand on the next line
ROMAN = re.compile(r"[ \t]*[IVXLC]{1,7}\.?[ \t]*")
MIN_TEXT = 200  # characters; a heading with less below it is a line of a table of contents, or a part's title


@dataclass(frozen=True)
class Chapter:
    """text[start:stop] of a document; its first line is `first_line`, from 1."""

    title: str
    start: int
    stop: int
    first_line: int


@dataclass(frozen=True)
class Heading:
    title: str
    start: int  # character
    end: int
    line: int


def chapters(text: str, path: str) -> list[Chapter]:
    """The text in consecutive chapters that leave nothing out; one, called `path`, if no headings are found."""
    lines = list(StringIO(text))  # str.splitlines would also split at form feeds
    headings = _markdown(lines) if path.lower().endswith(MARKDOWN) else _plain(lines)
    stops = [heading.start for heading in headings[1:]] + [len(text)]  # one too many where there is no heading
    kept = [h for h, stop in zip(headings, stops, strict=False) if len(text[h.end : stop].strip()) >= MIN_TEXT]
    if len(kept) < 2:
        return [Chapter(path, 0, len(text), 1)]
    found = [Chapter("beginning", 0, kept[0].start, 1)] if len(text[: kept[0].start].strip()) >= MIN_TEXT else []
    for heading, stop in zip(kept, [h.start for h in kept[1:]] + [len(text)], strict=True):
        whole = heading if found else Heading(heading.title, 0, 0, 1)  # the first takes a few lines before it along
        found.append(Chapter(heading.title, whole.start, stop, whole.line))
    return found


def _markdown(lines: list[str]) -> list[Heading]:
    """Headings of the topmost level that has several; what stands in fenced code is none."""
    found: list[tuple[int, Heading]] = []
    at, fence = 0, ""
    for number, line in enumerate(lines, 1):
        opening = re.match(r" {0,3}(```+|~~~+)", line)
        if opening and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else opening[1]
        match = re.match(r"(#{1,6})[ \t]+(.+?)[ \t#]*$", line) if not fence else None
        if match:
            found.append((len(match[1]), Heading(match[2], at, at + len(line), number)))
        at += len(line)
    counts = Counter(level for level, _ in found)
    level = min((level for level, count in counts.items() if count > 1), default=0)
    return [heading for at_level, heading in found if at_level <= level]


def _plain(lines: list[str]) -> list[Heading]:
    """Lines that name a chapter and stand alone, an empty line before and after them; else lone Roman numerals."""
    named, roman = [], []
    at = 0
    for i, line in enumerate(lines):
        blank_before, blank_after = (not (lines[j].strip() if 0 <= j < len(lines) else "") for j in (i - 1, i + 1))
        bare = line.strip()
        if blank_before and bare and (blank_after or BARE.fullmatch(bare)):
            heading = Heading(_title(lines, i), at, at + len(line), i + 1)
            if PLAIN.fullmatch(line.rstrip("\n")):
                named.append(heading)
            elif blank_after and ROMAN.fullmatch(line.rstrip("\n")):
                roman.append(heading)
        at += len(line)
    return named if len(named) > 1 else roman


def _title(lines: list[str], i: int) -> str:
    """The heading, with the title from the next lines where it is a number alone."""
    heading = " ".join(lines[i].split())
    if not BARE.fullmatch(heading):
        return heading
    below = [line.strip() for line in lines[i + 1 : i + 4]]
    title = below[0] if below and below[0] else below[1] if len(below) > 1 else ""
    after = below[below.index(title) + 1] if title and below.index(title) + 1 < len(below) else ""
    return f"{heading} {title}" if title and len(title) <= 60 and not after else heading
