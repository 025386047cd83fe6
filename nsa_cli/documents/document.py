"""What reading yields and what steers it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text: `path` as it is shown (posix, relative to the directory that was named), lines end in \\n."""

    path: str
    text: str


@dataclass(frozen=True)
class Skip:
    """A file that was found and not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ReadOptions:
    """Which files of a directory are read. Patterns are .gitignore patterns on the paths as they are shown."""

    include: tuple[str, ...] = ()  # read only what these match; () = everything
    exclude: tuple[str, ...] = ()  # read nothing that these match, not even when it is named
    hidden: bool = False  # also hidden files that git does not track
    gitignore: bool = True  # .gitignore, .git/info/exclude and the user's global excludes
    default_ignores: bool = True  # ignore.DEFAULT_IGNORES
    max_file_bytes: int = 1_000_000  # of a file found in a directory; see also read.MAX_NAMED_BYTES
