"""Documents -> one context: token ids in a stable order, exact counts, and which lines a token range comes from.

    Files:                  the listing, when there is more than one document
    a.py
    src/b.py

    === a.py ===
    the text of a.py
    === src/b.py ===
    the text of src/b.py

Listing, headers and texts are encoded one by one: a file's tokens do not depend on its neighbours, so counts add up.
A file may be there as its outline, and one of which only the name is wanted stands in the listing alone.
"""

import re
import shlex
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from nsa_cli.documents import Document, Skip
from nsa_cli.units import parse_quantity
from nsa_models.errors import BudgetError

if TYPE_CHECKING:
    from nsa_models.tokenizer import Tokenizer

BLOCK_CHARS = 1_000_000  # a longer text is encoded in blocks of whole lines: an encoding takes 100 times its text


@dataclass(frozen=True)
class Place:
    """Lines of a document, counted from 1, both included."""

    path: str
    first_line: int
    last_line: int


@dataclass(frozen=True)
class Grid:
    """The model's blocks of `block` tokens, as seen from a context that `offset` tokens of the prompt precede."""

    block: int
    offset: int

    def next(self, token: int) -> int:
        """The first block that begins at `token` or after it."""
        return token + -(token + self.offset) % self.block


@dataclass(frozen=True, eq=False)
class ContextFile:
    """A document, or some lines of a long one, at tokens [start, stop) of a context; its header comes first."""

    document: Document = field(repr=False)
    text: str = field(repr=False)  # ends in a line end
    header: array = field(repr=False)  # ids
    body: array = field(repr=False)  # ids
    offsets: array = field(repr=False)  # character of `text` where each token of `body` starts; then its length
    start: int = 0
    first_line: int = 1  # of the document's text

    @property
    def path(self) -> str:
        return self.document.path

    @property
    def ids(self) -> list[int]:
        return [*self.header, *self.body]

    @property
    def tokens(self) -> int:
        return len(self.header) + len(self.body)

    @property
    def stop(self) -> int:
        return self.start + self.tokens

    @cached_property
    def line_ends(self) -> array:
        return array("I", (i for i, character in enumerate(self.text) if character == "\n"))

    def lines(self, start: int, stop: int) -> Place:
        """Where the context's tokens [start, stop) come from, of which this file holds at least one."""
        body = self.start + len(self.header)
        first = self.offsets[max(start - body, 0)]
        # A token may hold several line ends, or only some bytes of a character: look where the next one starts.
        last = max(self.offsets[min(max(stop - body, 0), len(self.body))] - 1, first)
        return Place(self.path, *(self.file_line(self.line_at(character)) for character in (first, last)))

    def line_at(self, character: int) -> int:
        """The line of the document's text."""
        return self.first_line + bisect_left(self.line_ends, character)

    def file_line(self, line: int) -> int:
        """The line of the file, of which an outline holds a few."""
        return self.document.lines[line - 1] if self.document.lines else line

    @property
    def begins(self) -> str:
        """Where in the document, as `line 40` or `p. 41`; '' at its beginning."""
        if self.first_line == 1:
            return ""
        line = self.file_line(self.first_line)
        part = self.document.part_at(line)
        return part if part and self.document.converted else f"line {line}"

    def held(self) -> Document:
        """The document, of these lines alone."""
        if self.first_line == 1 and len(self.text) >= len(self.document.text):
            return self.document
        numbers = range(self.first_line, self.first_line + len(self.line_ends))
        parts = [replace(part, line=part.line - self.first_line + 1) for part in self.document.parts]
        return replace(
            self.document,
            text=self.text,
            parts=tuple(part for part in parts if 1 <= part.line <= len(numbers)),
            lines=tuple(map(self.file_line, numbers)),
            begins=self.begins,
        )


@dataclass(frozen=True, eq=False)
class Context:
    """What the model reads between the prompt's two ends."""

    files: list[ContextFile]
    listing: array  # ids
    skips: list[Skip]
    tokenizer: "Tokenizer"
    grid: Grid | None = None  # files after the first thing begin at a block; between them are empty lines
    documents: list[Document] = field(default_factory=list)  # in order, with those that only the listing names

    @property
    def tokens(self) -> int:
        return self.files[-1].stop if self.files else len(self.listing)

    @cached_property
    def ids(self) -> list[int]:
        ids = list(self.listing)
        padding = self.tokenizer.encode("\n")[-1:]
        for file in self.files:
            ids += padding * (file.start - len(ids))
            ids += file.ids
        return ids

    def locate(self, start: int, stop: int) -> list[Place]:
        """The lines that tokens [start, stop) come from, file by file.

        A header counts as its file's first line; the listing and what lies between files are nowhere.
        """
        return [file.lines(start, stop) for file in self.files if max(start, file.start) < min(stop, file.stop)]

    def cite(self, path: str, first: int, last: int) -> str:
        """Lines of a file as people cite them: `a.py:3-9`, `book.pdf p. 41`, `novel.epub ch. 7 "title"`."""
        return next(file.document for file in self.files if file.path == path).cite(first, last)

    def split(self, max_tokens: int) -> list["Context"]:
        """Contexts of at most `max_tokens` tokens that hold all files in order, without the listing.

        They break between files, and inside one only if it is too long alone: between lines, and inside a line only
        if that is too long alone. Raises BudgetError if max_tokens does not hold a header and some text.
        """
        if self.tokens <= max_tokens:
            return [self]
        shards: list[list[ContextFile]] = []
        for part in (part for file in self.files for part in cut(file, max_tokens, self.tokenizer)):
            (placed,) = place_after(shards[-1][-1].stop if shards else 0, [part], self.grid)
            if not shards or placed.stop > max_tokens:
                shards.append([])
                placed = replace(part, start=0)
            shards[-1].append(placed)
        return [Context(shard, array("I"), self.skips, self.tokenizer, self.grid, self.documents) for shard in shards]


def build_context(
    documents: Sequence[Document], tokenizer: "Tokenizer", skips: Sequence[Skip] = (), grid: Grid | None = None
) -> Context:
    """The context of `documents` (at least one) in their order."""
    return arrange(documents, [encode(d, tokenizer) for d in documents if d.level != "name"], tokenizer, skips, grid)


def arrange(
    documents: Sequence[Document],
    files: Sequence[ContextFile],
    tokenizer: "Tokenizer",
    skips: Sequence[Skip],
    grid: Grid | None,
) -> Context:
    """The context of documents that are encoded, all but those of which only the name is wanted."""
    listing = array("I", tokenizer.encode(listing_text(documents)) if len(documents) > 1 else ())
    placed = place_after(len(listing), files, grid)
    return Context(placed, listing, list(skips), tokenizer, grid, list(documents))


def listing_text(documents: Sequence[Document]) -> str:
    notes = {"full": "", "code": " (code)", "outline": " (outline)", "name": " (name only)"}
    return "Files:\n" + "".join(f"{document.path}{notes[document.level]}\n" for document in documents) + "\n"


def encode(document: Document, tokenizer: "Tokenizer", text: str | None = None, first_line: int = 1) -> ContextFile:
    """A file, not yet placed in a context. text: only this, from line `first_line` of the document's text on."""
    text = document.text if text is None else text
    text = text if text.endswith("\n") else text + "\n"
    body, offsets = array("I"), array("I")
    for start, stop in pairwise(block_borders(text)):
        ids, starts = tokenizer.encode_with_offsets(text[start:stop])
        body.extend(ids)
        offsets.extend(start + offset for offset in starts)
    offsets.append(len(text))
    file = ContextFile(document, text, array("I"), body, offsets, first_line=first_line)
    return replace(file, header=array("I", tokenizer.encode(f"=== {title(file)} ===\n")))


def title(file: ContextFile) -> str:
    """A path, and what there is to say about what follows: `a.py (outline)`, `book.pdf (from p. 41)`."""
    return file.path + notes(file.document, file.begins)


def notes(document: Document, begins: str) -> str:
    found = [document.level] * (document.level != "full") + [f"from {begins}"] * bool(begins)
    return f" ({', '.join(found)})" if found else ""


def block_borders(text: str) -> Iterator[int]:
    """0, then about every BLOCK_CHARS characters the start of a line, then the length.

    A line that is as long alone is cut as well, between words where there are any.
    """
    border = 0
    yield border
    while border < len(text):
        latest = border + BLOCK_CHARS
        stop = text.find("\n", latest - 1, latest + BLOCK_CHARS) + 1
        if not stop and len(text) > latest + BLOCK_CHARS:
            stop = max(text.rfind("\n", border, latest) + 1, text.rfind(" ", border, latest))
            stop = stop if stop > border else latest
        border = stop or len(text)
        yield border


def place_after(start: int, files: Sequence[ContextFile], grid: Grid | None = None) -> list[ContextFile]:
    """The files one after another from token `start` on."""
    placed = []
    for file in files:
        placed.append(replace(file, start=grid.next(start) if grid and start else start))
        start = placed[-1].stop
    return placed


def cut(file: ContextFile, max_tokens: int, tokenizer: "Tokenizer") -> Iterator[ContextFile]:
    """The file in parts of at most `max_tokens` tokens, headers included; itself if it fits."""
    if file.tokens <= max_tokens:
        yield file
        return
    start = 0
    while start < len(file.text):
        part, start = longest_part(file, start, max_tokens, tokenizer)
        yield part


def longest_part(file: ContextFile, start: int, max_tokens: int, tokenizer: "Tokenizer") -> tuple[ContextFile, int]:
    """The part that begins at character `start`, and the character where it stops.

    The whole file's tokens say where to cut; what is cut encodes a little differently, hence another try with less.
    """
    first_line = file.line_at(start)
    first_token = bisect_left(file.offsets, start)
    room = max_tokens - len(file.header)
    while room > 0:
        stop = file.offsets[min(first_token + room, len(file.body))]
        stop = file.text.rfind("\n", start, stop) + 1 or stop
        part = encode(file.document, tokenizer, file.text[start:stop], first_line)
        if part.tokens <= max_tokens and stop > start:
            return part, stop
        room -= max(part.tokens - max_tokens, 1)
    raise BudgetError(f"{max_tokens:,} tokens do not hold a part of {file.path} with its header")


def parse_tokens(text: str) -> int:
    """`128k` is 128000 and `128Ki` 131072 tokens; a usage error if it is neither."""
    return parse_quantity(text)


def check_budget(tokens: int, limit: int, files: Sequence[ContextFile]) -> None:
    """Raise BudgetError if `tokens`, those of `files` among them, exceed `limit`; it says by how much and what fits."""
    over = tokens - limit
    if over <= 0:
        return
    if limit <= 0:
        raise BudgetError("the question and its answer alone take more than the context holds; raise --max-context")
    largest = sorted(files, key=lambda file: -file.tokens)[:3]
    named = ", ".join(f"{file.path} {file.tokens:,}" for file in largest)
    on_disk = [file for file in files if not file.path.startswith("<")]  # not standard input, git's diff or log
    leave_out = what_to_exclude(over, {file.path: file.tokens for file in on_disk}, sum(f.tokens for f in files))
    advice = " ".join(f"--exclude {shlex.quote(escape(path))}" for path in leave_out)
    raise BudgetError(
        f"{tokens:,} tokens are {over:,} more than the {limit:,} that fit; largest: {named}; "
        + (
            f"it fits with {advice}"
            if advice
            else "narrow it with --include, or give --overflow drop, outline or shard"
        )
    )


def what_to_exclude(over: int, sizes: dict[str, int], whole: int) -> list[str]:
    """The smallest file or directory that holds `over` tokens; else the two or three largest files that do; else the
    two or three largest directories or files beside each other that do; else []. Of `whole` tokens, some are left.
    """
    candidates = Counter(sizes)
    for path, tokens in sizes.items():
        parents = (parent for parent in PurePosixPath(path).parents if parent.name not in ("", ".."))
        candidates.update({str(parent): tokens for parent in parents})
    enough = [(tokens, path) for path, tokens in candidates.items() if over <= tokens < whole]
    if enough:
        return [min(enough)[1]]
    for pool in (sizes, {path: n for path, n in candidates.items() if "/" not in path.strip("/")}):
        largest = sorted(pool, key=pool.__getitem__, reverse=True)
        for count in (2, 3):
            if count < len(pool) and sum(pool[path] for path in largest[:count]) >= over:
                return largest[:count]
    return []


def escape(path: str) -> str:
    """`path` as a pattern that matches it; of what a path is shown without, one character stands for another."""
    path = re.sub(r"([\\*?\[!#])", r"\\\1", path).replace("\ufffd", "?")
    return path[:-1] + "\\ " if path.endswith(" ") else path
