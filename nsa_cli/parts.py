"""A context in parts, each to be read on its own: file by file, chapter by chapter, or as much as fits at a time."""

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO

from nsa_cli.context import Context, ContextFile, encode, place_after
from nsa_cli.documents.chapters import chapters
from nsa_cli.documents.document import Part as DocumentPart
from nsa_models.errors import InputError


@dataclass(frozen=True)
class Part:
    """label: what it is, for people and for the model: `a.py`, `novel.txt: ch. 4`, `a.py:1-80 to b.py:1-12`."""

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
        found = chapters(file.text, _headings(file), file.path)
        for chapter in found:
            label = file.path if len(found) == 1 else f"{file.path}: {chapter.title}"
            text = file.text[chapter.start : chapter.stop]
            yield label, [encode(file.document, context.tokenizer, text, file.first_line + chapter.first_line - 1)]


def _headings(file: ContextFile) -> list[DocumentPart]:
    """The document's parts at the lines of this text, which may be some of its lines, or its outline."""
    lines = file.document.lines or range(1, file.document.text.count("\n") + 2)
    moved = [replace(part, line=bisect_left(lines, part.line) + 2 - file.first_line) for part in file.document.parts]
    return [part for part in moved if 1 <= part.line <= len(file.line_ends)]


def _context(files: Sequence[ContextFile], like: Context) -> Context:
    return Context(place_after(0, files), array("I"), like.skips, like.tokenizer)


def _label(shard: Context) -> str:
    places = shard.locate(0, shard.tokens)
    first, last = places[0], places[-1]
    if first.path == last.path:
        return f"{first.path}:{first.first_line}-{last.last_line}"
    return f"{first.path}:{first.first_line} to {last.path}:{last.last_line}"
