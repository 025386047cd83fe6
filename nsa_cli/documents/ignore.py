"""Ignore rules: gitignore patterns as git applies them, and git's own word where it is there."""

import os
from collections.abc import Iterable
from pathlib import Path

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from nsa_cli.documents.document import ReadOptions
from nsa_cli.documents.git import run_git

GIT_FILES = (".git/info/exclude", ".gitignore")  # the later, the stronger
OWN_FILES = (".ignore", ".nsaignore")

# What is almost never the subject of a question, by kind. detect.py finds more of some kinds by their text.
DEFAULT_IGNORES = {
    "tools": ".hg/ .svn/ .jj/ .idea/ .DS_Store .env .env.*",
    "packages": "node_modules/ bower_components/ .venv/ venv/ site-packages/ *.egg-info/",
    "vendored": "/vendor/ third_party/ third-party/",
    "caches": """__pycache__/ .tox/ .nox/ .mypy_cache/ .pytest_cache/ .ruff_cache/ .hypothesis/ .ipynb_checkpoints/
        .cache/ .gradle/ .terraform/ .next/ .nuxt/ *.tsbuildinfo""",
    "locks": """package-lock.json npm-shrinkwrap.json yarn.lock pnpm-lock.yaml bun.lock poetry.lock uv.lock pdm.lock
        Pipfile.lock Cargo.lock Gemfile.lock composer.lock go.sum flake.lock mix.lock Podfile.lock packages.lock.json
        gradle.lockfile""",
    "minified": "*.min.js *.min.mjs *.min.css *.js.map *.css.map",
    "generated": "",
    "encoded": "",
}
KINDS = tuple(DEFAULT_IGNORES)


class Rule:
    """One line of an ignore file. Raises ValueError for a line that git disregards as well."""

    def __init__(self, line: str) -> None:
        line = line if line.endswith("\\ ") else line.rstrip()
        # A pattern for directories is matched without its slash: pathspec's own reading of `a/**` takes in `a`.
        self.only_directories = line.endswith("/")
        self.pattern = GitIgnoreSpecPattern(line.removesuffix("/"))
        if self.pattern.include is None:
            raise ValueError("a blank line or a comment")

    def matches(self, path: str, is_directory: bool) -> bool:
        if self.only_directories and not is_directory:
            return False
        match = self.pattern.match_file(path)
        # pathspec captures a slash when only a parent matched. The walk has judged the parents already.
        return match is not None and match.match.lastindex is None


class Rules:
    """Patterns by directory, outermost first; the last pattern of the innermost directory that matches decides.

    Only a path itself is judged; whoever walks leaves excluded directories out, as git does. `?` and `[...]` stand for
    a character, where git takes a byte.
    """

    def __init__(self, files: tuple[str, ...] = (), levels: tuple[tuple[str, list[Rule]], ...] = ()) -> None:
        self.files = files
        self.levels = levels

    def adding(self, base: str, lines: Iterable[str]) -> "Rules":
        """These and `lines`, whose patterns are relative to `base` ('' or a path that ends in a slash)."""
        rules = []
        for line in lines:
            try:
                rules.append(Rule(line))
            except ValueError:
                continue
        return Rules(self.files, (*self.levels, (base, rules))) if rules else self

    def entering(self, directory: Path) -> "Rules":
        """These and what the ignore files in `directory` say."""
        lines = [line for name in self.files for line in read_lines(directory / name)]
        return self.adding(as_base(directory), lines)

    def matches(self, path: str, is_directory: bool) -> bool:
        """Whether `path` is matched, and not taken back by a later `!pattern`."""
        for base, rules in reversed(self.levels):
            for rule in reversed(rules):
                if rule.matches(path[len(base) :], is_directory):
                    return bool(rule.pattern.include)
        return False

    def tracks(self, path: str) -> bool:
        """Patterns know nothing of git's index."""
        return False


class GitListing:
    """What `git ls-files` says below a directory; stands in for Rules."""

    def __init__(self, tracked: set[str], listed: set[str]) -> None:
        self.tracked = tracked
        self.listed = listed

    def entering(self, directory: Path) -> "GitListing":
        return self

    def matches(self, path: str, is_directory: bool) -> bool:
        return path not in self.listed

    def tracks(self, path: str) -> bool:
        return path in self.tracked


def git_rules(root: Path, repository: Path | None, use_files: bool) -> "Rules | GitListing":
    """git's verdict below `root`: from git in a repository, else from the ignore files up to the repository's top.

    Where git lists nothing, patterns decide: a directory that is ignored itself was named in order to be read.
    """
    if repository and (listing := git_listing(root, use_files)):
        return listing
    if not use_files:
        return Rules()
    excludes = read_lines(Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "git" / "ignore")
    return above(Rules(GIT_FILES).adding(as_base(repository or root), excludes), root, repository)


def own_rules(root: Path, repository: Path | None, options: ReadOptions) -> Rules:
    """The default ignores, then .ignore and .nsaignore files up to the repository's top."""
    rules = Rules(OWN_FILES if options.own_ignores else ())
    rules = rules.adding(as_base(repository or root), default_patterns(options))
    return above(rules, root, repository)


def default_patterns(options: ReadOptions) -> list[str]:
    kinds = [kind for kind in KINDS if options.default_ignores and kind not in options.keep]
    return [pattern for kind in kinds for pattern in DEFAULT_IGNORES[kind].split()]


def above(rules: Rules, root: Path, repository: Path | None) -> Rules:
    """`rules` and those of the directories from the repository's top down to right above `root`."""
    if repository and repository != root:
        parents = [parent for parent in root.parents if parent.is_relative_to(repository)]
        for directory in reversed(parents):
            rules = rules.entering(directory)
    return rules


def find_repository(directory: Path) -> Path | None:
    """The work tree that holds `directory`: the nearest directory upwards with a .git."""
    return next((d for d in (directory, *directory.parents) if os.path.lexists(d / ".git")), None)


def git_listing(root: Path, use_files: bool) -> GitListing | None:
    """None where git is missing, refuses (another user's repository) or lists nothing."""
    tracked = git_paths(root, "--cached")
    others = git_paths(root, "--others", *(["--exclude-standard"] if use_files else []))
    if not tracked and not others:
        return None
    tracked, others = with_parents(tracked), with_parents(others)
    base = as_base(root)
    return GitListing({base + path for path in tracked}, {base + path for path in tracked | others})


def git_paths(root: Path, *options: str) -> list[str]:
    """Paths below `root` from `git ls-files`; [] when git fails."""
    try:
        run = run_git(root, "ls-files", "-z", *options)
    except OSError:
        return []
    return [path for path in os.fsdecode(run.stdout).split("\0") if path] if run.returncode == 0 else []


def with_parents(paths: Iterable[str]) -> set[str]:
    """The paths and every directory above them; a repository inside another is listed as `path/`."""
    found: set[str] = set()
    for path in paths:
        path = path.rstrip("/")
        while path and path not in found:
            found.add(path)
            path = path.rpartition("/")[0]
    return found


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig", errors="surrogateescape").split("\n")
    except (OSError, ValueError):
        return []


def as_base(directory: Path) -> str:
    return directory.as_posix().rstrip("/") + "/"
