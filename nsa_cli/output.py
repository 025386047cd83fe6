"""What goes where: the answer or the records on stdout; progress, warnings and timings on stderr. No colours."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

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
