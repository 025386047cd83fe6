"""Documents out of git's history: the files of a revision, a diff, a log."""

import os
from collections.abc import Iterator
from pathlib import Path

from nsa_cli.documents.document import Document, ReadOptions
from nsa_cli.documents.git import run_git
from nsa_cli.documents.ignore import find_repository
from nsa_models.errors import InputError

MAX_BYTES = 64_000_000  # of a diff or a log


def revision_files(root: Path, revision: str) -> Iterator[tuple[str, str, int]]:
    """(path relative to `root`, object, bytes) of each regular file below the directory `root` in `revision`."""
    listing = _git(root, "ls-tree", "-r", "-z", "--long", commit(root, revision))
    for line in os.fsdecode(listing).split("\0"):
        if line:
            about, _, path = line.partition("\t")
            mode, kind, identity, size = about.split()
            if kind == "blob" and mode != "120000":  # neither a submodule nor a symbolic link
                yield path, identity, int(size)


def commit(root: Path, revision: str) -> str:
    """The commit's full name. InputError where there is none, or no repository."""
    return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", what=revision)[
        :-1
    ].decode()


def history_documents(paths: tuple[str, ...], options: ReadOptions) -> list[Document]:
    """`git diff` and `git log` as `options` ask for them, of what `paths` name, else of the repository here."""
    root, below = _place(paths)
    documents = []
    if options.diff:
        command = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--end-of-options", options.diff)
        documents.append((f"<git diff {options.diff}>", command))
    if options.log:
        command = ("log", "--no-show-signature", "--no-ext-diff", "--no-textconv", "--no-color", "--stat")
        command = (*command, f"--max-count={options.log}")
        documents.append((f"<git log -{options.log}>", command))
    return [Document(name, _text(root, name, command, below)) for name, command in documents]


def _place(paths: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The repository of the first path, and the paths in it."""
    absolute = [Path(os.path.abspath(path)) for path in paths if path != "-"] or [Path.cwd()]
    first = absolute[0] if absolute[0].is_dir() else absolute[0].parent
    root = find_repository(first.resolve())
    if root is None:
        raise InputError(f"{first}: not in a git repository; --rev, --diff and --log read its history")
    return root, [os.path.realpath(path) for path in absolute if paths]


def _text(root: Path, name: str, command: tuple[str, ...], below: list[str]) -> str:
    drivers = os.fsdecode(run_git(root, "config", "-z", "--name-only", "--get-regexp", r"^filter\..*").stdout)
    # Comparing with the work tree would run the filters that the repository's configuration names.
    silenced = [part for key in filter(None, drivers.split("\0")) for part in ("-c", f"{key}=")]
    data = _git(root, *silenced, *command, "--", *below, what=name)
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: {len(data):,} bytes; name fewer paths")
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return text if text.strip() else f"({name.strip('<>')}: nothing)\n"


def _git(root: Path, *arguments: str, what: str = "") -> bytes:
    try:
        run = run_git(root, *arguments)
    except OSError:
        raise InputError("git is not installed; --rev, --diff and --log need it") from None
    if run.returncode:
        said = run.stderr.decode("utf-8", "replace").strip().split("\n")[0].removeprefix("fatal: ")
        raise InputError(f"{root}: git knows no {what!r}" + (f" ({said})" if said else ""))
    return run.stdout
