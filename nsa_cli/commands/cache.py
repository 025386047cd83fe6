"""`nsa cache`: what is stored, whether it is whole, and how to be rid of it."""

import json
import re
import time
from datetime import datetime

import click

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.completion import complete_models, complete_stored
from nsa_cli.output import say, verbosity_options
from nsa_cli.settings import cache_dir
from nsa_cli.store import Entry, Store, read_ids
from nsa_cli.token_cache import FILE as TOKENS
from nsa_cli.units import format_bytes, parse_quantity
from nsa_models.errors import ModelError

AGES = (("d", 86400), ("h", 3600), ("min", 60))


def parse_age(text: str) -> float:
    """`90min`, `12h`, `30d`: seconds; else a usage error."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min|h|d)", text.strip())
    if not match:
        raise click.BadParameter(f"{text!r} is not an age; write 90min, 12h or 30d")
    return float(match[1]) * dict(AGES)[match[2]]


@click.group("cache", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List, check and remove stored contexts.

    A question about files that were read before starts from their stored context. The least recently used ones go
    when the store is full; all may be removed at any time.

    \b
      nsa cache ls
      nsa cache show 3f09
      nsa cache prune --max-size 5G --unused 30d
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
@click.argument("id", shell_complete=complete_stored)
@click.option("--text", is_flag=True, help="Print the stored text, as the model reads it.")
@click.option("--model", "-m", metavar="NAME|PATH", shell_complete=complete_models, help="Of --text, if it has moved.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@verbosity_options
def show(id: str, text: bool, model: str | None, as_json: bool) -> None:
    """Show a stored context: its size, its age, its model, and where it is.

    \b
      nsa cache show 3f09
      nsa cache show 3f09 --text | less
    """
    entry = Store(cache_dir()).find(id)
    if text:
        click.echo(Checkpoint(model or entry.model).tokenizer.text(list(read_ids(entry))), nl=False)
        return
    record = _record(entry) | {"capacity": entry.capacity, "rope_factor": entry.rope_factor, "path": str(entry.path)}
    if as_json:
        click.echo(json.dumps(record))
        return
    for name in ("created", "used"):
        record[name] = datetime.fromtimestamp(record[name]).isoformat(" ", "seconds")
    for name, value in list(record.items())[1:]:
        click.echo(f"{name:11}  {value:,}" if isinstance(value, int) else f"{name:11}  {value}")


@command.command()
@click.argument("ids", nargs=-1, metavar="[ID]...", shell_complete=complete_stored)
@click.option("--remove", is_flag=True, help="Remove those that are damaged.")
@verbosity_options
def verify(ids: tuple[str, ...], remove: bool) -> None:
    """Read stored contexts, all or those of the ids, and compare them with their checksums. Exit code 5 if any is
    damaged.

    \b
      nsa cache verify
      nsa cache verify 3f09 --remove
    """
    store = Store(cache_dir())
    entries = [store.find(id) for id in ids] if ids else store.entries()
    damaged = 0
    for entry in entries:
        wrong = store.verify(entry)
        damaged += bool(wrong)
        click.echo(f"{entry.id[:12]}  {wrong or ('ok' if entry.checksum is not None else 'ok, has no checksum')}")
        if wrong and remove:
            store.remove(entry.id)
    if damaged:
        raise ModelError(f"{damaged} of {len(entries)} stored contexts are damaged{'; removed' if remove else ''}")


@command.command()
@click.option("--max-size", type=parse_quantity, metavar="BYTES", help="Let what is kept take so much: 500M, 5G.")
@click.option("--unused", type=parse_age, metavar="AGE", help="Remove what was not used for so long: 12h, 30d.")
@verbosity_options
def prune(max_size: int | None, unused: float | None) -> None:
    """Remove the stored contexts that were not used for longest.

    \b
      nsa cache prune --unused 30d
      nsa cache prune --max-size 5G
    """
    if max_size is None and unused is None:
        raise click.UsageError("give --max-size or --unused, or both; nsa cache rm --all removes everything")
    removed = Store(cache_dir()).prune(max_size, unused)
    say(f"removed {len(removed)}, {format_bytes(sum(e.bytes for e in removed))}")


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
    for unit, size in AGES:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return "now"
