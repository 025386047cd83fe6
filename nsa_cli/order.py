"""In which order files are read, and which of them matters most."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from nsa_cli.documents import Document
from nsa_cli.documents.git import run_git
from nsa_cli.documents.ignore import Rules, find_repository
from nsa_cli.documents.walk import matched

ORDERS = ("path", "readme", "recency", "churn", "importance")
COMMITS = 1000  # of a repository's history that count


def in_order(documents: Sequence[Document], policy: str, prefer: Sequence[str] = ()) -> list[Document]:
    """path: as they come. readme: READMEs first. The others: what matters most last, next to the question; and so does
    what a pattern of `prefer` matches, whatever the policy.
    """
    ordered = _in_order(documents, policy)
    preferred = zip(preferences(ordered, prefer), ordered, strict=True)
    return [document for _, document in sorted(preferred, key=lambda pair: pair[0])]


def preferences(documents: Sequence[Document], prefer: Sequence[str]) -> list[int]:
    """Higher for what an earlier pattern matches; 0 for what none does."""
    rules = [Rules().adding("", [pattern]) for pattern in prefer]
    paths = (document.path.lstrip("/") for document in documents)
    return [next((len(rules) - i for i, rule in enumerate(rules) if matched(rule, path)), 0) for path in paths]


def _in_order(documents: Sequence[Document], policy: str) -> list[Document]:
    if policy == "path":
        return list(documents)
    if policy == "readme":
        return sorted(
            documents, key=lambda document: (not is_readme(document.path), document.path.count("/"), document.path)
        )
    ranked = zip(priorities(documents, policy), documents, strict=True)
    return [document for _, document in sorted(ranked, key=lambda pair: (pair[0], pair[1].path))]


def priorities(documents: Sequence[Document], policy: str) -> list[float]:
    """How much each document matters; path and readme say nothing of that, so importance does."""
    if policy in ("recency", "churn"):
        history = {"recency": last_changes, "churn": change_counts}[policy]
        return by_history(documents, history)
    from nsa_cli.importance import importance

    # A README says what the rest is about, and nothing refers to it.
    ranks = zip(importance(documents), documents, strict=True)
    return [1.0 if is_readme(document.path) and "/" not in document.path else rank for rank, document in ranks]


def is_readme(path: str) -> bool:
    return PurePosixPath(path).name.lower().startswith("readme")


def by_history(documents: Sequence[Document], history: Callable[[Path], dict[str, float]]) -> list[float]:
    """A number for each document from its repository's history; 0 where there is none."""
    found: dict[Path, dict[str, float]] = {}
    tops: dict[Path, Path | None] = {}
    numbers = []
    for document in documents:
        source = document.source
        folder = Path(os.path.realpath(source.parent)) if source else None
        if folder not in tops:
            tops[folder] = find_repository(folder) if folder else None
        top = tops[folder]
        if top and top not in found:
            found[top] = history(top)
        path = (folder / source.name).relative_to(top).as_posix() if top else ""
        number = found[top].get(path) if top else None
        if number is None:
            number = modified(source) if history is last_changes and source else 0.0
        numbers.append(number)
    return numbers


def change_counts(repository: Path) -> dict[str, float]:
    """Path -> commits that changed it."""
    return Counter(path for _, paths in commits(repository) for path in paths)


def last_changes(repository: Path) -> dict[str, float]:
    """Path -> time of the last commit that changed it. Left out: what differs from that, whose own time counts."""
    times: dict[str, float] = {}
    for time, paths in commits(repository):
        for path in paths:
            times.setdefault(path, time)
    try:
        tracked = _names(run_git(repository, "ls-files", "-z").stdout)
        changed = set(_names(run_git(repository, "diff-files", "--name-only", "-z", "--no-ext-diff").stdout))
    except OSError:
        return {}
    return {path: times.get(path, 0.0) for path in tracked if path not in changed}


def commits(repository: Path) -> list[tuple[float, list[str]]]:
    """(time, paths) of the last commits, the newest first; [] where git is missing or fails."""
    form = "--format=format:%x01%ct"
    try:
        run = run_git(repository, "log", f"--max-count={COMMITS}", "--no-renames", "--name-only", "-z", form)
    except OSError:
        return []
    found = []
    for entry in os.fsdecode(run.stdout).split("\x01") if run.returncode == 0 else ():
        time, _, names = entry.partition("\n")
        if time.strip("\0").isdigit():
            found.append((float(time.strip("\0")), [name for name in names.split("\0") if name]))
    return found


def modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _names(data: bytes) -> list[str]:
    return [name for name in os.fsdecode(data).split("\0") if name]
