"""What goes where: the answer or the records on stdout, never coloured; progress, warnings and timings on stderr."""

import functools
import io
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nsa_models.errors import InputError, NSAError

if TYPE_CHECKING:
    from nsa_cli.documents import Skip

QUIET, NORMAL, VERBOSE, TRACEBACKS = -1, 0, 1, 2
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # torch's words, on a CPU and on a GPU


class Verbosity:
    """How much one run of the program says, and whether in colour; it travels in click's context."""

    level = NORMAL
    color = "auto"


def verbosity() -> int:
    context = click.get_current_context(silent=True)
    found = context.find_object(Verbosity) if context else None
    return found.level if found else NORMAL


def verbosity_options(command):
    """Add `-q`, `-v` and `--color`; they are remembered here, the command does not see them."""

    def remember(context: click.Context, parameter: click.Parameter, value: int) -> None:
        if value:
            context.ensure_object(Verbosity).level = QUIET if parameter.name == "quiet" else value

    def remember_color(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value:
            context.ensure_object(Verbosity).color = value

    quiet = click.option(
        "--quiet", "-q", is_flag=True, expose_value=False, callback=remember, help="Say nothing but errors on stderr."
    )
    verbose = click.option(
        "--verbose", "-v", count=True, expose_value=False, callback=remember, help="Say more; -vv shows tracebacks."
    )
    color = click.option(
        "--color",
        type=click.Choice(["auto", "always", "never"]),
        expose_value=False,
        callback=remember_color,
        help="Colour on stderr. Default: on a terminal, unless NO_COLOR is set; FORCE_COLOR asks for it.",
    )
    return quiet(verbose(color(command)))


def colored() -> bool:
    """--color, then NO_COLOR, then FORCE_COLOR or CLICOLOR_FORCE, then whether stderr is a terminal with colours."""
    context = click.get_current_context(silent=True)
    found = context.find_object(Verbosity) if context else None
    if found and found.color != "auto":
        return found.color == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def emit(text: str) -> None:
    """A piece of the answer: to stdout, unchanged and at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def say(message: str, level: int = NORMAL, **style: object) -> None:
    """A line on stderr, if the run is at least as verbose as `level`. style: click.style's, where there are colours."""
    if verbosity() >= level:
        color = colored()
        click.echo(click.style(message, **style) if color and style else message, err=True, color=color)


def warn(message: str) -> None:
    say(f"nsa: warning: {message}", fg="yellow")


def output_option(command):
    """Add `-o`: what the command prints on stdout goes into a file, whole, once it has ended without an error."""

    @functools.wraps(command)
    def into_file(*args, output, **kwargs):
        if output in (None, "-"):
            return command(*args, **kwargs)
        folder = Path(output).resolve().parent
        if Path(output).is_dir() or not folder.is_dir():
            problem = "is a directory" if folder.is_dir() else f"there is no directory {folder}"
            raise InputError(f"cannot write to {output}: {problem}")
        with redirect_stdout(io.StringIO()) as text:
            result = command(*args, **kwargs)
        write_atomically(output, text.getvalue().encode(errors="replace"))
        return result

    return click.option("--output", "-o", metavar="FILE", help="Write to FILE instead of stdout, whole or not at all.")(
        into_file
    )


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
    elif isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
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


def shows_bars() -> bool:
    """Whether stderr is a terminal that a bar may be drawn on."""
    return verbosity() >= NORMAL and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(done, total)`. A bar on a terminal; elsewhere nothing, or with -v a line per tenth."""
    if shows_bars():
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


def silent(text: str) -> None:
    """What to tell nobody with."""
