"""`nsa cache`: what is stored, and how to be rid of it."""

import json
import time

import click

from nsa_cli.completion import complete_stored
from nsa_cli.output import say, verbosity_options
from nsa_cli.settings import cache_dir
from nsa_cli.store import Entry, Store
from nsa_cli.token_cache import FILE as TOKENS
from nsa_cli.units import format_bytes


@click.group("cache", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List and remove stored contexts.

    A question about files that were read before starts from their stored context. The least recently used ones go
    when the store is full; all may be removed at any time.

    \b
      nsa cache ls
      nsa cache rm 3f09
      nsa cache rm --all
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per stored context.")
@verbosity_options
def ls(as_json: bool) -> None:
    """List stored contexts, the last used first.

    \b
      nsa cache ls
      nsa cache ls --json | jq .bytes
    """
    entries = Store(cache_dir()).entries()
    if as_json:
        for entry in entries:
            click.echo(json.dumps(_record(entry)))
        return
    if entries:
        click.echo(f"{'id':12}  {'tokens':>9}  {'size':>8}  {'used':>8}  model")
    for e in entries:
        click.echo(
            f"{e.id[:12]}  {e.tokens:>9,}  {format_bytes(e.bytes):>8}  {_age(time.time() - e.used):>8}  {e.model}"
        )
    say(f"{len(entries)} stored, {format_bytes(sum(e.bytes for e in entries))}")


@command.command()
@click.argument("ids", nargs=-1, metavar="[ID]...", shell_complete=complete_stored)
@click.option("--all", "everything", is_flag=True, help="Remove every stored context, and the counted tokens of files.")
@verbosity_options
def rm(ids: tuple[str, ...], everything: bool) -> None:
    """Remove stored contexts by id, or by as much of it as is unique.

    \b
      nsa cache rm 3f09
      nsa cache rm --all
    """
    store = Store(cache_dir())
    if bool(ids) == everything:
        raise click.UsageError("name the ids to remove, or give --all")
    if everything:
        ids = tuple(entry.id for entry in store.entries())
    removed = [store.remove(prefix) for prefix in ids]
    if everything:
        (cache_dir() / TOKENS).unlink(missing_ok=True)
    say(f"removed {len(removed)}, {format_bytes(sum(e.bytes for e in removed))}")


@command.command()
def path() -> None:
    """Print the folder that holds the stored contexts.

    \b
      nsa cache path
      du -sh "$(nsa cache path)"
    """
    click.echo(Store(cache_dir()).root)


def _record(entry: Entry) -> dict:
    shown = ("id", "tokens", "bytes", "created", "used", "model")
    return {"schema_version": 1} | {name: getattr(entry, name) for name in shown}


def _age(seconds: float) -> str:
    """How long ago, in the largest unit that fits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return "now"
