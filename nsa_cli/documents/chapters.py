"""Where chapters begin in a plain book, and sections in Markdown."""

import re
from collections.abc import Iterator

from nsa_cli.documents.document import Part

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
NUMBER = rf"(?:\d{{1,3}}|[ivxlc]+|{'|'.join(WORDS)}|(?:the )?(?:first|last))"
ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
CHAPTER = re.compile(
    rf"\s{{0,8}}(?P<kind>chapter|letter|kapitel|chapitre|cap[ií]tulo)\s+(?P<number>{NUMBER})\b[.:—–-]*\s*(?P<title>.*)",
    re.IGNORECASE,
)
NAMED = re.compile(r"\s{0,8}(prologue|epilogue|preface|foreword|introduction|afterword)[.:]?\s*", re.IGNORECASE)
MAX_TITLE = 80  # characters; a longer line is a sentence that begins with "Chapter 3 says"
FENCE = re.compile(r" {0,3}(```+|~~~+)")
UNDERLINE = re.compile(r"={3,}|-{3,}")
HEADING = re.compile(r" {0,3}(#{1,3})\s+(.+?)\s*#*\s*$")


def book_parts(text: str) -> tuple[Part, ...]:
    """`ch. 7 "title"` for each line that opens a chapter; () unless there are two, since one may be chance."""
    lines = text.split("\n")
    openings = [line for line in range(len(lines)) if _opens(lines, line)]
    if not openings:
        return ()
    # In a table of contents, nothing but more openings follows: the next begins before any text came.
    chapters = [
        line
        for line, following in zip(openings, [*openings[1:], len(lines)], strict=True)
        if any(len(body) > MAX_TITLE // 2 for body in lines[line + 1 : following]) or following - line > 8
    ]
    if sum(bool(CHAPTER.match(lines[line])) for line in chapters) < 2:
        return ()
    return tuple(Part(line + 1, label) for line, label in zip(chapters, _labels(lines, chapters), strict=True))


def _opens(lines: list[str], number: int) -> bool:
    line = lines[number]
    if len(line) > MAX_TITLE or (number and lines[number - 1].strip()):
        return False
    match = CHAPTER.match(line)
    if match:  # "chapter one was dull": a title begins with a capital, and so does the word
        return line.strip()[0].isupper() and not match["title"][:1].islower()
    return bool(NAMED.fullmatch(line)) and line.strip()[0].isupper()


def _labels(lines: list[str], chapters: list[int]) -> Iterator[str]:
    count = 0
    for line in chapters:
        match = CHAPTER.match(lines[line])
        if not match:
            yield f'"{lines[line].strip().rstrip(".:")}"'
            continue
        count += 1
        number = _value(match["number"].lower()) or count
        title = match["title"].strip() or _title_below(lines, line)
        yield f"ch. {number}" + (f' "{title}"' if title else "")


def _value(number: str) -> int | None:
    """7 for `7`, `vii` and `seven`."""
    if number.isdigit():
        return int(number)
    if number in WORDS:
        return WORDS.index(number) + 1
    if not set(number) <= set(ROMAN):
        return None
    values = [ROMAN[letter] for letter in number]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


def _title_below(lines: list[str], line: int) -> str:
    """`Down the Rabbit-Hole` under `CHAPTER I.`: a short line between empty ones, no sentence."""
    below = [i for i in range(line + 1, min(line + 4, len(lines))) if lines[i].strip()]
    if not below or (below[0] + 1 < len(lines) and lines[below[0] + 1].strip()):
        return ""
    title = lines[below[0]].strip()
    return title.rstrip(".") if len(title) <= MAX_TITLE // 4 * 3 and not title.endswith((",", ";", '"', "”")) else ""


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
                parts.append(Part(number, f'§ "{heading[2]}"'))
            elif UNDERLINE.fullmatch(line) and before.strip() and not second.strip() and before[0] not in "|>#-*`":
                parts.append(Part(number - 1, f'§ "{before.strip()}"'))
        before, second = line, before
    return tuple(parts)
