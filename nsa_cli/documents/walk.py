"""A directory -> the files to read in it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nsa_cli.documents.document import ReadOptions
from nsa_cli.documents.ignore import GitListing, Rules, default_patterns, find_repository, git_rules, own_rules


@dataclass(frozen=True)
class Found:
    """A path below the directory, relative to it, and why it cannot be read if so."""

    path: str
    reason: str | None = None


@dataclass(frozen=True)
class _Directory:
    path: str  # relative to the root: '' or 'a/b/'
    real: Path  # where it lies: elsewhere than `path` says behind a link
    git: Rules | GitListing
    own: Rules
    included: bool
    repository: Path | None


def walk(root: Path, options: ReadOptions, shown: str = "") -> Iterator[Found]:
    """Files below `root` (resolved) in no particular order; what the rules leave out is not mentioned.

    `shown` is put before the relative paths that `options.include` and `exclude` are matched against. Symbolic links
    are not followed, so that nothing outside of `root` is read and no cycle is entered; `options.follow_links` follows
    them anywhere, but enters no directory twice.
    """
    include, exclude = (Rules().adding("", patterns) for patterns in (options.include, options.exclude))
    pending = [_entering("", root, options, not options.include)]
    entered = {_identity(root)}
    while pending:
        directory = pending.pop()
        try:
            entries = list(os.scandir(directory.real))
        except OSError as error:
            yield Found(directory.path, (error.strerror or str(error)).lower())
            continue
        git, own = (rules.entering(directory.real) for rules in (directory.git, directory.own))
        base = directory.real.as_posix().rstrip("/") + "/"
        for entry in entries:
            path, link = directory.path + entry.name, entry.is_symlink()
            is_directory = _is_directory(entry, options.follow_links)
            hidden = entry.name.startswith(".") and not options.hidden and not git.tracks(base + entry.name)
            # Behind a link, a directory is one to the user's patterns; to git, a link is a file.
            ignored = git.matches(base + entry.name, is_directory and not link)
            ignored = ignored or own.matches(base + entry.name, is_directory)
            if entry.name == ".git" or hidden or ignored or exclude.matches(shown + path, is_directory):
                continue
            included = directory.included or include.matches(shown + path, is_directory)
            if not is_directory:
                if included:
                    yield Found(path, _unreadable(entry, options.follow_links))
                continue
            nested = directory.repository and os.path.lexists(f"{base}{entry.name}/.git")
            real = Path(os.path.realpath(entry.path)) if link else directory.real / entry.name
            if nested and not options.submodules:
                yield Found(path, "a repository of its own; --submodules reads it")
            elif options.follow_links and (identity := _identity(real)) in entered:
                yield Found(path, "a directory that is read already")
            else:
                entered |= {identity} if options.follow_links else set()
                pending.append(
                    _entering(f"{path}/", real, options, included)
                    if nested or link
                    else _Directory(f"{path}/", real, git, own, included, directory.repository)
                )


def wanted(options: ReadOptions) -> Callable[[str, str], bool]:
    """Whether a file of a revision, all of which git tracks, is read, by its path and the path that is shown: as a
    walk would find it, but for ignore files.
    """
    patterns = (default_patterns(options), options.exclude, options.include)
    defaults, exclude, include = (Rules().adding("", lines) for lines in patterns)

    def is_wanted(path: str, shown: str) -> bool:
        included = not options.include or matched(include, shown)
        return included and not matched(defaults, path) and not matched(exclude, shown)

    return is_wanted


def matched(rules: Rules, path: str) -> bool:
    """Whether a file or a directory above it is matched."""
    above = [parent.as_posix() for parent in PurePosixPath(path).parents][:-1]
    return rules.matches(path, False) or any(rules.matches(directory, True) for directory in above)


def _entering(path: str, real: Path, options: ReadOptions, included: bool) -> _Directory:
    """A directory whose rules begin anew: the root, a repository in another, what a link leads to."""
    repository = find_repository(real)
    git = git_rules(real, repository, options.gitignore)
    return _Directory(path, real, git, own_rules(real, repository, options), included, repository)


def _is_directory(entry: os.DirEntry, follow_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_links)
    except OSError:  # a loop of links
        return False


def _identity(directory: Path) -> tuple[int, int]:
    status = os.stat(directory)
    return status.st_dev, status.st_ino


def _unreadable(entry: os.DirEntry, follow_links: bool) -> str | None:
    if entry.is_symlink() and not follow_links:
        return "symbolic link; --follow-links reads it"
    try:
        return None if entry.is_file(follow_symlinks=follow_links) else "not a regular file"
    except OSError as error:  # a loop of links
        return (error.strerror or str(error)).lower()
