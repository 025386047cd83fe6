"""A context in parts, each to be read on its own: file by file, chapter by chapter, or as much as fits at a time."""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO

from nsa_cli.chapters import Chapter, chapters
from nsa_cli.context import Context, ContextFile, encode, place_after
from nsa_models.errors import InputError


@dataclass(frozen=True)
class Part:
    """label: what it is, for people and for the model: `a.py`, `novel.txt: CHAPTER IV`, `a.py:1-80 to b.py:1-12`."""

    label: str
    context: Context


def parts(context: Context, over: str, max_tokens: int) -> list[Part]:
    """The context over `document` (itself), `file`, `chapter` or `shard`; only the document may be longer than
    `max_tokens`. Raises BudgetError if max_tokens does not hold a header and some text.
    """
    if over == "document":
        return [Part("", context)]
    if over == "shard":
        shards = context.split(max_tokens)
        return [Part(_label(shard) if len(shards) > 1 else "", shard) for shard in shards]
    found = []
    for label, files in _by_file(context) if over == "file" else _by_chapter(context):
        whole = _context(files, context)
        pieces = whole.split(max_tokens)
        found += [Part(label if len(pieces) == 1 else f"{label} ({_label(piece)})", piece) for piece in pieces]
    return found


def excerpts(context: Context, patterns: Sequence[str], around: int) -> Context:
    """Only the lines in which a pattern is found, with `around` lines before and after each of them.

    Line numbers stay those of the files. Raises InputError if there are none.
    """
    regexes = [re.compile(pattern) for pattern in patterns]
    files = []
    for file in context.files:
        lines = list(StringIO(file.text))  # str.splitlines would also split at form feeds
        found = [i for i, line in enumerate(lines) if any(regex.search(line) for regex in regexes)]
        for start, stop in _ranges(found, around, len(lines)):
            text = "".join(lines[start:stop])
            files.append(encode(file.document, context.tokenizer, text, file.first_line + start))
    if not files:
        count = len(context.files)
        raise InputError(f"no line of {count:,} file{'s' * (count > 1)} matches {' or '.join(patterns)}")
    return _context(files, context)


def _ranges(matches: Sequence[int], around: int, count: int) -> Iterator[tuple[int, int]]:
    """Line ranges that hold the matches and the lines around them; those that touch are one."""
    start = stop = -1
    for line in matches:
        if start >= 0 and line - around <= stop:
            stop = min(line + around + 1, count)
            continue
        if start >= 0:
            yield start, stop
        start, stop = max(line - around, 0), min(line + around + 1, count)
    if start >= 0:
        yield start, stop


def _by_file(context: Context) -> Iterator[tuple[str, list[ContextFile]]]:
    """A path and what the context holds of it, which may be several excerpts."""
    grouped: dict[str, list[ContextFile]] = {}
    for file in context.files:
        grouped.setdefault(file.path, []).append(file)
    yield from grouped.items()


def _by_chapter(context: Context) -> Iterator[tuple[str, list[ContextFile]]]:
    for file in context.files:
        found = _own_chapters(file) or chapters(file.text, file.path)
        for chapter in found:
            label = file.path if len(found) == 1 else f"{file.path}: {chapter.title}"
            text = file.text[chapter.start : chapter.stop]
            yield label, [encode(file.document, context.tokenizer, text, file.first_line + chapter.first_line - 1)]


def _own_chapters(file: ContextFile) -> list[Chapter]:
    """Those that the format itself marks, as an EPUB does; what comes before the first belongs to it."""
    marked = [part for part in file.document.parts if file.document.converted and part.label.startswith("ch. ")]
    lines = {part.label.partition(" § ")[0]: part.line for part in reversed(marked)}
    starts = [(line - file.first_line, title) for title, line in reversed(lines.items())]
    starts = [(line, title) for line, title in starts if 0 <= line < len(file.line_ends)]
    if len(starts) < 2:
        return []
    starts[0] = (0, starts[0][1])
    at = [file.line_ends[line - 1] + 1 if line else 0 for line, _ in starts] + [len(file.text)]
    return [Chapter(title, at[i], at[i + 1], line + 1) for i, (line, title) in enumerate(starts)]


def _context(files: Sequence[ContextFile], like: Context) -> Context:
    return Context(place_after(0, files), array("I"), like.skips, like.tokenizer)


def _label(shard: Context) -> str:
    places = shard.locate(0, shard.tokens)
    first, last = places[0], places[-1]
    if first.path == last.path:
        return f"{first.path}:{first.first_line}-{last.last_line}"
    return f"{first.path}:{first.first_line} to {last.path}:{last.last_line}"
