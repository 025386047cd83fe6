"""What goes where: the answer or the records on stdout; progress, warnings and timings on stderr. No colours."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nsa_models.errors import NSAError

if TYPE_CHECKING:
    from nsa_cli.documents import Skip

QUIET, NORMAL, VERBOSE, TRACEBACKS = -1, 0, 1, 2


class Verbosity:
    """How much one run of the program says; it travels in click's context."""

    level = NORMAL


def verbosity() -> int:
    context = click.get_current_context(silent=True)
    found = context.find_object(Verbosity) if context else None
    return found.level if found else NORMAL


def verbosity_options(command):
    """Add `-q` and `-v`; they are remembered here, the command does not see them."""

    def remember(context: click.Context, parameter: click.Parameter, value: int) -> None:
        if value:
            context.ensure_object(Verbosity).level = QUIET if parameter.name == "quiet" else value

    quiet = click.option(
        "--quiet", "-q", is_flag=True, expose_value=False, callback=remember, help="Say nothing but errors on stderr."
    )
    verbose = click.option(
        "--verbose", "-v", count=True, expose_value=False, callback=remember, help="Say more; -vv shows tracebacks."
    )
    return quiet(verbose(command))


def emit(text: str) -> None:
    """A piece of the answer: to stdout, unchanged and at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def say(message: str, level: int = NORMAL) -> None:
    """A line on stderr, if the run is at least as verbose as `level`."""
    if verbosity() >= level:
        click.echo(message, err=True)


def warn(message: str) -> None:
    say(f"nsa: warning: {message}")


def say_skipped(skips: Sequence["Skip"]) -> None:
    """Name what was found and not read: a few of many, with -v all."""
    shown = skips if verbosity() >= VERBOSE else skips[:3]
    if skips:
        more = f" and {len(skips) - len(shown)} more (-v names them)" if len(skips) > len(shown) else ""
        say(f"nsa: not read: {', '.join(f'{skip.path} ({skip.reason})' for skip in shown)}{more}")


def describe(error: Exception) -> tuple[str, int]:
    """What went wrong, in one line, and the exit code that says so."""
    code = getattr(error, "exit_code", 1)
    if isinstance(error, click.ClickException):
        message = error.format_message().rstrip(".")
    elif isinstance(error, NSAError):
        message = str(error)
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        message = "out of memory; close other programs, or read less (nsa plan shows what a context needs)"
    elif isinstance(error, OSError) and error.strerror:
        message = ": ".join(filter(None, (error.filename and os.fsdecode(error.filename), error.strerror)))
    else:
        message = f"unexpected {type(error).__name__}: {error}; -vv shows where"
    return " ".join(message.split()), code


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file beside `path` and move it into place: `path` holds the old content or the new, never a part.

    A link stays a link to the file that is replaced; what is no regular file (/dev/stdout) is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def progress(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(done, total)`. A bar on a terminal; elsewhere nothing, or with -v a line per tenth."""
    if verbosity() >= NORMAL and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from tqdm import tqdm

        with tqdm(desc=label, total=total, unit=f" {unit}", leave=False, dynamic_ncols=True, file=sys.stderr) as bar:
            yield lambda done, _: bar.update(done - bar.n)
    else:
        shown = 0

        def advance(done: int, total: int) -> None:
            nonlocal shown
            if done * 10 // total > shown:
                shown = done * 10 // total
                say(f"{label}: {shown * 10} % of {total:,} {unit}", VERBOSE)

        yield advance
