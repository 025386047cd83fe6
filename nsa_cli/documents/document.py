"""What reading yields and what steers it."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from nsa_models.text import Text


@dataclass(frozen=True)
class Part:
    """A page, chapter, section or cell: it begins at `line` of a text (from 1) and is cited as `label`."""

    line: int
    label: str


@dataclass(frozen=True)
class Extract:
    """The text of a file, its line ends \\n, and what the file said about it."""

    text: str
    parts: tuple[Part, ...] = ()
    converted: bool = False  # lines are those of `text`, not of the file: cite parts, not lines
    note: str | None = None  # what of the file is not in `text`


@dataclass(frozen=True)
class Document(Text):
    """A text that was read, and what is known of it."""

    parts: tuple[Part, ...] = ()
    converted: bool = False
    lines: tuple[int, ...] | None = field(default=None, repr=False)  # of the file, for each line; None = 1, 2, 3...
    level: str = "full"  # or outline, or name: then it is only in the list of files
    source: Path | None = field(default=None, compare=False, repr=False)  # the file on disk, if it is one

    def cite(self, first: int, last: int) -> str:
        """Lines first..last (from 1, both included) as people cite them: `a.py:3-9`, `book.pdf p. 41`."""
        label = self.labels(first, last)
        place = self.path if self.converted else f"{self.path}:{first}-{last}"
        return f"{place} {label}" if label else place

    def labels(self, first: int, last: int) -> str:
        """The parts that lines first..last belong to: `p. 41`, `p. 41-43`, `ch. 7 "a" to ch. 8 "b"`, or ''."""
        a, b = (self.part_at(line) for line in (first, last))
        if a == b or not a:
            return b
        kind = a.partition(" ")[0]
        other, _, other_number = b.partition(" ")
        return f"{a}-{other_number}" if kind == other in ("p.", "cell") else f"{a} to {b}"

    def part_at(self, line: int) -> str:
        index = bisect_right(self.parts, line, key=attrgetter("line"))
        return self.parts[index - 1].label if index else ""


@dataclass(frozen=True)
class Skip:
    """A file that was found and not read, or not whole, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ReadOptions:
    """Which files of a directory are read. Patterns are .gitignore patterns on the paths as they are shown."""

    include: tuple[str, ...] = ()  # read only what these match; () = everything
    exclude: tuple[str, ...] = ()  # read nothing that these match, not even when it is named
    hidden: bool = False  # also hidden files that git does not track
    gitignore: bool = True  # .gitignore, .git/info/exclude and the user's global excludes
    default_ignores: bool = True  # ignore.DEFAULT_IGNORES and what detect.py finds
    max_file_bytes: int = 1_000_000  # of a text found in a directory; see also read.MAX_NAMED_BYTES
    keep: tuple[str, ...] = ()  # kinds of default ignores that are read all the same; see ignore.KINDS
    own_ignores: bool = True  # .ignore and .nsaignore
    follow_links: bool = False  # symbolic links, wherever they lead; each directory once
    submodules: bool = False  # repositories inside a repository
    encoding: str | None = None  # of texts without a byte order mark; None = recognized
    all_rows: bool = False  # of tables; False = the first table.MAX_ROWS
    listed: tuple[str, ...] = ()  # files to read beside the paths; what cannot be read of them is skipped
    revision: str | None = None  # a git revision to read files from, in place of the work tree
    diff: str | None = None  # a revision or a range whose difference is read as a document
    log: int | None = None  # commits whose log is read as a document


class NotText(ValueError):
    """The bytes are no text; the message says what they are."""


def assemble(pieces: Iterable[tuple[str, str]], marked: bool = True) -> Extract:
    """A converted text of labelled pieces; each begins with its label in brackets, which the model can cite."""
    texts, parts, line = [], [], 1
    for label, text in pieces:
        text = text.strip("\n")
        if not text.strip():
            continue
        text = (f"[{label}]\n" if marked and label else "") + text + "\n"
        if label:
            parts.append(Part(line, label))
        texts.append(text)
        line += text.count("\n")
    return Extract("".join(texts), tuple(parts), converted=True)
