"""Paths as a user names them -> documents."""

import glob
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nsa_cli.documents.convert import convert
from nsa_cli.documents.detect import machine_made, without_data
from nsa_cli.documents.document import Document, Extract, NotText, ReadOptions, Skip
from nsa_cli.documents.git import Objects
from nsa_cli.documents.ignore import Rules
from nsa_cli.documents.readers import BOOKS, PROSE, extract, suffix_of
from nsa_cli.documents.revision import history_documents, revision_files
from nsa_cli.documents.walk import matched, walk, wanted
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
    named: bool = True  # it was asked for: read in spite of what it looks like
    listed: bool = False  # ... by a list of files: where it cannot be read, it is skipped
    reason: str | None = None  # why it cannot be read, if that is known without opening it
    blob: tuple[Path, str] | None = None  # a directory and git's object, of a file of a revision


def read_documents(
    paths: Sequence[str], options: ReadOptions, stdin: BinaryIO | None = None
) -> tuple[list[Document], list[Skip]]:
    """The documents that `paths` (files, directories, '-' for `stdin`) hold, and what was found but not read.

    Both are sorted by path, whatever the order of the arguments or of the file system. Paths are relative to the
    directory when a single one is named, else they begin as they were typed. A named file is read in spite of ignore
    files and of what --include says; `options.listed` too, but what cannot be read of those is only skipped. Raises
    InputError where a named file cannot be read, and where nothing is left.
    """
    history = history_documents(tuple(paths), options) if options.diff or options.log else []
    documents, skips = ([], []) if history and options.no_files else _read(_files(paths, options), options, stdin)
    documents += history
    if not documents:
        raise InputError(_nothing([*paths, *options.listed], skips, options.include))
    skips.sort(key=lambda skip: (skip.path, skip.reason))
    return sorted(documents, key=lambda document: (document.path, document.text)), skips


def _read(files: Iterator[_File], options: ReadOptions, stdin: BinaryIO | None) -> tuple[list[Document], list[Skip]]:
    documents: list[Document] = []
    skips: list[Skip] = []
    total = 0
    with closing(Objects()) as objects:
        for file in _distinct(files):
            try:
                extract = _extract(file, options, stdin, objects)
            except Unreadable as error:
                if file.named and not file.listed:
                    advice = "" if ";" in str(error) else "; leave it out, or name another file"
                    raise InputError(f"{file.shown}: {error}{advice}") from None
                skips.append(Skip(file.shown, str(error)))
                continue
            documents.append(Document(file.shown, extract.text, extract.parts, extract.converted, source=file.path))
            skips += [Skip(file.shown, extract.note)] if extract.note else []
            total += len(extract.text)
            if total > MAX_TOTAL_BYTES:
                limit = format_bytes(MAX_TOTAL_BYTES)
                raise InputError(f"more than {limit} of text; name fewer files or use --include")
    return documents, skips


def _files(paths: Sequence[str], options: ReadOptions) -> Iterator[_File]:
    """Named files first, so that one which a directory holds too counts as named."""
    if "" in paths:
        raise InputError("a path is empty, as an unset variable of a shell is; . is the folder that you are in")
    exclude = Rules().adding("", options.exclude)
    paths = [found for path in paths for found in expanded(path)]
    listed = set(options.listed) - set(paths)
    names = [(name, name in listed) for name in dict.fromkeys([*paths, *options.listed])]
    if options.revision is not None:
        yield from _revision_files([name for name, _ in names], options)
        return
    for name, in_list in sorted(names, key=lambda item: os.path.isdir(item[0])):
        path = Path(name)
        shown = path.as_posix()
        if name == "-" and not in_list:
            yield _File(None, STDIN, MAX_NAMED_BYTES)
        elif path.is_dir():
            prefix = "" if len(names) == 1 or shown == "." else shown.rstrip("/") + "/"
            if prefix and matched(exclude, shown.lstrip("/")):
                continue
            root = path.resolve()
            for found in walk(root, options, prefix.lstrip("/")):
                shown = printable(prefix + found.path) or "."
                limit = _limit(found.path, options)
                yield _File(root / found.path, shown, limit, named=False, reason=found.reason)
        elif not os.path.lexists(path) if in_list else not os.path.exists(path):
            if not in_list:
                raise InputError(f"no such file or directory: {printable(name)}")
            yield _File(path, printable(shown), 0, listed=True, reason="no such file or directory")
        elif not matched(exclude, shown.lstrip("/")):
            yield _File(path, printable(shown), max(MAX_NAMED_BYTES, options.max_file_bytes), listed=in_list)


def expanded(path: str) -> list[str]:
    """What a pattern names, such as `src/**/*.py` in quotes, or where no shell expands it; else the path itself."""
    is_pattern = any(character in path for character in "*?[") and not os.path.lexists(path)
    return sorted(glob.glob(path, recursive=True)) or [path] if is_pattern else [path]


def _revision_files(names: Sequence[str], options: ReadOptions) -> Iterator[_File]:
    """What `names` (files and directories, which the work tree need not have any more) held in a revision."""
    is_wanted = wanted(options)
    for name in names or ["."]:
        path = Path(os.path.abspath(name)).resolve()
        root = next(parent for parent in (path, *path.parents) if parent.is_dir())
        below = "" if path == root else path.relative_to(root).as_posix()
        typed = Path(name).as_posix()
        prefix = "" if len(names) <= 1 or typed == "." else typed.rstrip("/") + "/"
        found = False
        for relative, blob, size in revision_files(root, options.revision):
            named = relative == below
            if below and not named and not relative.startswith(below + "/"):
                continue
            found = True
            shown = typed if named else prefix + relative[len(below) + bool(below) :]
            if named or is_wanted(relative, shown.lstrip("/")):
                limit = max(MAX_NAMED_BYTES, options.max_file_bytes) if named else _limit(relative, options)
                reason = f"{format_bytes(size)}, over the limit of {format_bytes(limit)}" if size > limit else None
                yield _File(root / relative, printable(shown), limit, named, reason=reason, blob=(root, blob))
        if not found:
            raise InputError(f"{options.revision}: no such file or directory: {printable(name)}")


def converter(path: str, options: ReadOptions) -> tuple[str, ...] | None:
    """The command that the user has for files such as this."""
    patterns = ((Rules().adding("", [pattern]), command) for pattern, command in options.convert)
    return next((command for rules, command in patterns if matched(rules, path.lstrip("/"))), None)


def _limit(path: str, options: ReadOptions) -> int:
    """Most bytes of a file found in a directory; a book's are more than its text."""
    default = options.max_file_bytes == ReadOptions.max_file_bytes
    is_book = suffix_of(path) in BOOKS or converter(path, options)
    return MAX_NAMED_BYTES if default and is_book else options.max_file_bytes


def _distinct(files: Iterator[_File]) -> Iterator[_File]:
    seen = set()
    for file in files:
        # A walk begins at a resolved directory; only a link that is followed leads away from there.
        followed = file.path and not file.reason and not file.blob and (file.named or file.path.is_symlink())
        key = file.path.resolve() if followed else file.path
        if key not in seen:
            seen.add(key)
            yield file


def _extract(file: _File, options: ReadOptions, stdin: BinaryIO | None, objects: Objects) -> Extract:
    if file.reason:
        raise Unreadable(file.reason)
    command = converter(file.shown, options)
    try:
        data = _bytes(file, stdin, objects)
        on_disk = None if file.blob else file.path
        found = convert(command, on_disk, data, file.shown) if command else extract(data, file.shown, options)
    except NotText as error:
        raise Unreadable(str(error)) from None
    if not found.text.strip():
        raise Unreadable("empty")
    if not file.named and options.default_ignores and not found.converted:
        kind, what = machine_made(found.text, suffix_of(file.shown) in PROSE) or (None, "")
        if kind and kind not in options.keep:
            raise Unreadable(f"{what}; --keep {kind} reads it")
    if not file.named and options.default_ignores and "encoded" not in options.keep:
        text, characters = without_data(found.text)
        if characters:
            note = f"{characters:,} characters of data; --keep encoded reads them"
            found = replace(found, text=text, note="; ".join(filter(None, (found.note, note))))
    return found


def _bytes(file: _File, stdin: BinaryIO | None, objects: Objects) -> bytes:
    """At most `file.max_bytes` bytes; a larger file is not read, and a larger stream not to its end."""
    try:
        if file.blob:
            return objects.read(*file.blob)
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


def _nothing(paths: Sequence[str], skips: list[Skip], include: Sequence[str]) -> str:
    message = f"nothing to read in {', '.join(map(printable, paths))}"
    if skips:
        more = f" and {len(skips) - 1} more" if len(skips) > 1 else ""
        return f"{message}; skipped {skips[0].path} ({skips[0].reason}){more}"
    if include:
        return f"{message}: no file matches {', '.join(include[:5])}{', ...' if len(include) > 5 else ''}"
    return f"{message}; ignored and hidden files are read with --no-gitignore, --no-default-ignores and --hidden"


def printable(path: str) -> str:
    """A file name may hold line ends, terminal codes or bytes that are no text; what is shown and encoded may not."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in path)
