"""Where chapters begin in a plain book and sections in Markdown and reStructuredText, and how a text is cut there."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise

from nsa_cli.documents.document import Part

MIN_TEXT = 200  # characters; what has less is not worth being read on its own
MAX_TITLE = 80  # characters; a longer line is a sentence that begins with "Chapter 3 says"
MAX_LINES = 3  # of a heading that goes on below
MIN_LINES = 8  # with as few and short ones below it, a heading stands in a table of contents

ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
WORDS = [*ONES.split(), "eighteen", "nineteen"]
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()  # noqa: SIM905
ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
_ONE, _TEN = "|".join(reversed(WORDS)), "|".join(TENS)
NUMBER = rf"\d{{1,3}}|[ivxlc]+|(?:{_TEN})(?:[- ](?:{_ONE}))?|{_ONE}|(?:the )?(?:{'|'.join(ORDINALS)}|last)"
# What a division is called in the text -> how it is cited. Those of the first line hold others.
OUTER = {"book": "book", "part": "part", "volume": "vol.", "act": "act"}
INNER = {"letter": "letter", "canto": "canto", "stave": "stave", "scene": "scene", "section": "section"}
INNER |= dict.fromkeys(("chapter", "kapitel", "chapitre", "capitulo", "capítulo", "capitolo"), "ch.")
DIVISION = re.compile(
    rf"\s{{0,8}}(?P<kind>{'|'.join(OUTER | INNER)})\s+(?P<number>{NUMBER})\b[.:—–-]*\s*(?P<title>.*)", re.IGNORECASE
)
ALONE = "prologue|epilogue|preface|foreword|introduction|afterword|conclusion|appendix"
NAMED = re.compile(rf"\s{{0,8}}((?:first |second )?(?:{ALONE}))\b[.:]?[ \d–-]*", re.IGNORECASE)
NUMERAL = re.compile(r"\s*(?P<number>[IVXLC]{1,7})\.?\s*")

FENCE = re.compile(r" {0,3}(```+|~~~+)")
UNDERLINE = re.compile(r"={3,}|-{3,}")
RULE = re.compile(r"([-=`:'\"~^_*+#<>.])\1{2,}")
MAX_LEVEL = 3  # of a heading that is cited
HEADING = re.compile(r" {0,3}(#{1,3})\s+(.+?)\s*#*\s*$")


@dataclass(frozen=True)
class Chapter:
    """text[start:stop] of a document; its first line is `first_line`, from 1."""

    title: str
    start: int
    stop: int
    first_line: int


def chapters(text: str, parts: Sequence[Part], name: str) -> list[Chapter]:
    """The text in consecutive chapters that leave nothing out: at the outermost headings that there are several of.

    One, called `name`, where there are none. What has little text goes to the chapter before it.
    """
    counts = Counter(part.level for part in parts if part.level)
    level = min((level for level, count in counts.items() if count > 1), default=0)
    headings = [part for part in parts if 0 < part.level <= level]
    starts = line_starts(text)
    at = [starts[part.line - 1] for part in headings]
    lengths = [len(text[start:stop].strip()) for start, stop in pairwise([*at, len(text)])]
    kept = [(start, part) for start, part, n in zip(at, headings, lengths, strict=True) if n >= MIN_TEXT]
    if len(kept) < 2:
        return [Chapter(name, 0, len(text), 1)]
    first, part = kept[0]
    begins = [(0, 1, "beginning")] if len(text[:first].strip()) >= MIN_TEXT else []
    kept[0] = (first, part) if begins else (0, Part(1, part.label))  # it takes a few lines before it along
    begins += [(start, part.line, part.label) for start, part in kept]
    stops = [start for start, _, _ in begins[1:]] + [len(text)]
    return [Chapter(title, start, stop, line) for (start, line, title), stop in zip(begins, stops, strict=True)]


def line_starts(text: str) -> list[int]:
    """The character at which each line begins, and the length."""
    starts = [0]
    for line in StringIO(text):  # str.splitlines would also split at form feeds
        starts.append(starts[-1] + len(line))
    return starts


@dataclass(frozen=True)
class Opening:
    """A line that opens a chapter: how it is cited, as what (outer, inner or named), and where its text begins."""

    line: int  # from 0
    label: str
    kind: str
    below: int  # the line after the heading


def book_parts(text: str) -> tuple[Part, ...]:
    """`ch. 7 "title"`, `book 2 ch. 1` and the like for each line that opens a chapter of a plain text; () unless there
    are two, since one may be chance.
    """
    lines = text.split("\n")
    openings = list(_openings(lines, _division))
    if sum(opening.kind != "named" for opening in openings) < 2:
        openings = list(_openings(lines, _numeral))
    parts: list[Part] = []
    outer, begin = "", None  # the division that is open; where one began right above the next chapter
    numbered = 0
    stops = [opening.line for opening in openings[1:]] + [len(lines)]
    for opening, stop in zip(openings, stops, strict=False):
        body = lines[opening.below : stop]
        has_text = len(body) > MIN_LINES or any(len(line) > MAX_TITLE // 2 for line in body)
        if opening.kind != "inner":
            outer = "" if opening.kind == "named" and has_text else opening.label
        if has_text:
            label = f"{outer} {opening.label}".strip() if opening.kind == "inner" else opening.label
            parts.append(Part((opening.line if begin is None else begin) + 1, label, 1))
            numbered += opening.kind != "named"
        # Where no text follows, what is no outer division is a line of a table of contents.
        begin = opening.line if not has_text and opening.kind != "inner" else None
    return tuple(parts) if numbered > 1 else ()


def plain_parts(text: str) -> tuple[Part, ...]:
    """The chapters of a plain text; else its underlined titles, if there are several."""
    found = book_parts(text) or rst_parts(text)
    return found if len(found) > 1 else ()


def _openings(lines: list[str], reading) -> Iterator[Opening]:
    """Headings begin a paragraph, and most stand alone; `reading` says what one is called."""
    for number, line in enumerate(lines):
        if len(line) <= MAX_TITLE and line.strip() and not (number and lines[number - 1].strip()):
            opening = reading(lines, number)
            if opening:
                yield opening


def _division(lines: list[str], number: int) -> Opening | None:
    line = lines[number]
    if not line.strip()[0].isupper():
        return None
    named = NAMED.fullmatch(line)
    if named:
        return Opening(number, f'"{named[1].strip()}"', "named", number + 1)
    match = DIVISION.match(line)
    # "Chapter one was dull": a title begins with a capital, and so does the word.
    if not match or match["title"][:1].islower():
        return None
    paragraph = next((i for i in range(number + 1, len(lines)) if not lines[i].strip()), len(lines)) - number
    if paragraph > MAX_LINES:
        return None
    kind = match["kind"].lower()
    value = _value(match["number"].lower())
    label = f"{(OUTER | INNER)[kind]} {value or match['number'].lower().removeprefix('the ')}"
    title, below = _title(lines, number, match["title"])
    return Opening(number, label + (f' "{title}"' if title else ""), "outer" if kind in OUTER else "inner", below)


def _numeral(lines: list[str], number: int) -> Opening | None:
    match = NUMERAL.fullmatch(lines[number])
    if not match or (number + 1 < len(lines) and lines[number + 1].strip()):
        return None
    return Opening(number, f"ch. {_value(match['number'].lower())}", "inner", number + 1)


def _value(number: str) -> int | None:
    """7 for `7`, `vii`, `seven` and `the seventh`; None for `last`."""
    number = number.removeprefix("the ")
    if number.isdigit():
        return int(number)
    if number in ORDINALS:
        return ORDINALS.index(number) + 1
    tens, _, ones = number.replace("-", " ").partition(" ")
    if tens in TENS:
        return 20 + 10 * TENS.index(tens) + (WORDS.index(ones) + 1 if ones else 0)
    if number in WORDS:
        return WORDS.index(number) + 1
    if not set(number) <= set(ROMAN):
        return None
    values = [ROMAN[letter] for letter in number]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


def _title(lines: list[str], number: int, beside: str) -> tuple[str, int]:
    """A chapter's title, and the line after it: beside the number, going on below; or `Down the Rabbit-Hole` under
    `CHAPTER I.`, a short line between empty ones and no sentence.
    """
    below = number + 1
    if beside.strip():
        while below < len(lines) and lines[below].strip():
            beside, below = f"{beside.strip()} {lines[below].strip()}", below + 1
        return beside.strip().rstrip("."), below
    found = next((i for i in range(below, min(below + MAX_LINES, len(lines))) if lines[i].strip()), None)
    if found is None or (found + 1 < len(lines) and lines[found + 1].strip()):
        return "", below
    title = lines[found].strip()
    is_title = len(title) <= MAX_TITLE * 3 // 4 and not title.endswith((",", ";", '"', "”"))
    return (title.rstrip("."), found + 1) if is_title and not DIVISION.match(title) else ("", below)


def markdown_parts(text: str) -> tuple[Part, ...]:
    """`§ "title"` for each heading of the first three levels outside of code."""
    parts, fence = [], None
    before, second = "", ""  # the line before, and the one before that
    for number, line in enumerate(text.split("\n"), 1):
        if mark := FENCE.match(line):
            if fence is None:
                fence = mark[1]
            elif mark[1].startswith(fence) and not line.strip().strip("`~"):
                fence = None
        elif fence is None:
            if heading := HEADING.match(line):
                parts.append(Part(number, f'§ "{heading[2]}"', len(heading[1])))
            elif UNDERLINE.fullmatch(line) and before.strip() and not second.strip() and before[0] not in "|>#-*`":
                parts.append(Part(number - 1, f'§ "{before.strip()}"', 1 if line[0] == "=" else 2))
        before, second = line, before
    return tuple(parts)


def rst_parts(text: str) -> tuple[Part, ...]:
    """`§ "title"` for each title that is underlined, and perhaps overlined too; what comes first is the outermost."""
    lines = [line.rstrip() for line in text.split("\n")]
    parts, levels = [], {}
    for number, (above, line, below) in enumerate(zip(["", *lines], lines, lines[1:], strict=False), 1):
        overlined = above == below
        is_title = line and not RULE.fullmatch(line) and RULE.fullmatch(below) and len(below) >= len(line)
        if is_title and (overlined or not (above or line[0].isspace())):
            level = levels.setdefault((below[0], overlined), len(levels) + 1)
            if level <= MAX_LEVEL:
                parts.append(Part(number - overlined, f'§ "{line.strip()}"', level))
    return tuple(parts)
