"""The files below a directory that are to be read."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nsa_cli.documents.document import ReadOptions
from nsa_cli.documents.ignore import GitListing, Rules, find_repository, git_rules, own_rules


@dataclass(frozen=True)
class Found:
    """A path below the directory, relative to it, and why it cannot be read if so."""

    path: str
    reason: str | None = None


@dataclass(frozen=True)
class _Directory:
    path: str  # relative to the root: '' or 'a/b/'
    git: Rules | GitListing
    own: Rules
    included: bool


def walk(root: Path, options: ReadOptions, shown: str = "") -> Iterator[Found]:
    """Files below `root` (resolved) in no particular order; what the rules leave out is not mentioned.

    `shown` is put before the relative paths that `options.include` and `exclude` are matched against. Symbolic links
    are not followed, so nothing outside of `root` is read and no cycle is entered.
    """
    repository = find_repository(root)
    base = root.as_posix().rstrip("/") + "/"
    include, exclude = (Rules().adding("", patterns) for patterns in (options.include, options.exclude))
    git = git_rules(root, repository, options.gitignore)
    own = own_rules(root, repository, options.default_ignores)
    pending = [_Directory("", git, own, not options.include)]
    while pending:
        directory = pending.pop()
        try:
            entries = list(os.scandir(base + directory.path))
        except OSError as error:
            yield Found(directory.path, (error.strerror or str(error)).lower())
            continue
        git, own = (rules.entering(root / directory.path) for rules in (directory.git, directory.own))
        for entry in entries:
            path, is_directory = directory.path + entry.name, entry.is_dir(follow_symlinks=False)
            hidden = entry.name.startswith(".") and not options.hidden and not git.tracks(base + path)
            ignored = any(rules.matches(base + path, is_directory) for rules in (git, own))
            if entry.name == ".git" or hidden or ignored or exclude.matches(shown + path, is_directory):
                continue
            included = directory.included or include.matches(shown + path, is_directory)
            if is_directory and repository and os.path.lexists(f"{base}{path}/.git"):
                yield Found(path, "a repository of its own")
            elif is_directory:
                pending.append(_Directory(f"{path}/", git, own, included))
            elif included:
                yield Found(path, _unreadable(entry))


def _unreadable(entry: os.DirEntry) -> str | None:
    if entry.is_symlink():
        return "symbolic link"
    return None if entry.is_file(follow_symlinks=False) else "not a regular file"
