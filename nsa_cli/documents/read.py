"""Paths as a user names them -> documents."""

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nsa_cli.documents.decode import NotText, decode
from nsa_cli.documents.document import Document, ReadOptions, Skip
from nsa_cli.documents.ignore import Rules
from nsa_cli.documents.walk import walk
from nsa_cli.units import format_bytes
from nsa_models.errors import InputError

STDIN = "<stdin>"  # how standard input is shown
MAX_NAMED_BYTES = 64_000_000  # of a file that was named and of stdin; one found in a directory has the options' limit
MAX_TOTAL_BYTES = 512_000_000


class Unreadable(ValueError):
    """Why a file gives no document."""


@dataclass(frozen=True)
class _File:
    path: Path | None  # None = stdin
    shown: str
    max_bytes: int
    named: bool = True
    reason: str | None = None  # why it cannot be read, if that is known without opening it


def read_documents(
    paths: Sequence[str], options: ReadOptions, stdin: BinaryIO | None = None
) -> tuple[list[Document], list[Skip]]:
    """The documents that `paths` (files, directories, '-' for `stdin`) hold, and what was found but not read.

    Both are sorted by path, whatever the order of the arguments or of the file system. Paths are relative to the
    directory when a single one is named, else they begin as they were typed. A named file is read in spite of ignore
    files and of what --include says. Raises InputError where a named file cannot be read, and where nothing is left.
    """
    documents: list[Document] = []
    skips: list[Skip] = []
    total = 0
    for file in _distinct(_files(paths, options)):
        try:
            text = _text(file, stdin)
        except Unreadable as error:
            if file.named:
                raise InputError(f"{file.shown}: {error}") from None
            skips.append(Skip(file.shown, str(error)))
            continue
        documents.append(Document(file.shown, text))
        total += len(text)
        if total > MAX_TOTAL_BYTES:
            raise InputError(f"more than {format_bytes(MAX_TOTAL_BYTES)} of text; name fewer files or use --include")
    skips.sort(key=lambda skip: (skip.path, skip.reason))
    if not documents:
        raise InputError(_nothing(paths, skips))
    return sorted(documents, key=lambda document: (document.path, document.text)), skips


def _files(paths: Sequence[str], options: ReadOptions) -> Iterator[_File]:
    """Named files first, so that one which a directory holds too counts as named."""
    exclude = Rules().adding("", options.exclude)
    for name in sorted(paths, key=os.path.isdir):
        path = Path(name)
        shown = path.as_posix()
        if name == "-":
            yield _File(None, STDIN, MAX_NAMED_BYTES)
        elif path.is_dir():
            prefix = "" if len(paths) == 1 or shown == "." else shown.rstrip("/") + "/"
            root = path.resolve()
            for found in walk(root, options, prefix.lstrip("/")):
                shown = printable(prefix + found.path) or "."
                yield _File(root / found.path, shown, options.max_file_bytes, named=False, reason=found.reason)
        elif not os.path.exists(path):
            raise InputError(f"no such file or directory: {printable(name)}")
        elif not exclude.matches(shown.lstrip("/"), is_directory=False):
            yield _File(path, printable(shown), max(MAX_NAMED_BYTES, options.max_file_bytes))


def _distinct(files: Iterator[_File]) -> Iterator[_File]:
    seen = set()
    for file in files:
        # A walk begins at a resolved directory and follows no links.
        key = file.path.resolve() if file.path and file.named else file.path
        if key not in seen:
            seen.add(key)
            yield file


def _text(file: _File, stdin: BinaryIO | None) -> str:
    if file.reason:
        raise Unreadable(file.reason)
    try:
        text = decode(_bytes(file, stdin))
    except NotText as error:
        raise Unreadable(str(error)) from None
    if not text.strip():
        raise Unreadable("empty")
    return text


def _bytes(file: _File, stdin: BinaryIO | None) -> bytes:
    """At most `file.max_bytes` bytes; a larger file is not read, and a larger stream not to its end."""
    try:
        if file.path is None:
            return _limited(stdin or _standard_input(), file.max_bytes)
        with open(file.path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > file.max_bytes:
                raise Unreadable(f"{format_bytes(size)}, over the limit of {format_bytes(file.max_bytes)}")
            return _limited(stream, file.max_bytes)
    except OSError as error:
        raise Unreadable((error.strerror or str(error)).lower()) from None


def _limited(stream: BinaryIO, max_bytes: int) -> bytes:
    data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Unreadable(f"over the limit of {format_bytes(max_bytes)}")
    return data


def _standard_input() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise Unreadable("is a terminal; name a file or a directory, or pipe text in")
    return sys.stdin.buffer


def _nothing(paths: Sequence[str], skips: list[Skip]) -> str:
    message = f"nothing to read in {', '.join(map(printable, paths))}"
    if skips:
        more = f" and {len(skips) - 1} more" if len(skips) > 1 else ""
        return f"{message}; skipped {skips[0].path} ({skips[0].reason}){more}"
    return f"{message}; ignored and hidden files are read with --no-gitignore, --no-default-ignores and --hidden"


def printable(path: str) -> str:
    """A file name may hold line ends, terminal codes or bytes that are no text; what is shown and encoded may not."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in path)
