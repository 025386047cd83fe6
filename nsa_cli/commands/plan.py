"""`nsa plan`: what a question about documents would read and cost, without loading a model."""

import json
from dataclasses import dataclass

import click

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.options import (
    document_options,
    json_option,
    output_option,
    packing_options,
    paths_or_stdin,
    verbosity_options,
)
from nsa_cli.completion import complete_models, complete_paths
from nsa_cli.context import Context, Grid, check_budget, parse_tokens, title
from nsa_cli.documents import read_documents
from nsa_cli.packing import pack_documents, room_beside, tree
from nsa_cli.reply import SCHEMA_VERSION
from nsa_cli.request import Request
from nsa_cli.settings import cache_dir
from nsa_cli.speed import expected
from nsa_cli.token_cache import TokenCache
from nsa_cli.units import format_bytes, format_seconds

QUESTION_TOKENS = 64  # kept free for a question that is not known yet


@dataclass(frozen=True)
class Cost:
    """Estimates for reading a context once; a stored one is read in no time."""

    memory_bytes: int
    seconds: tuple[float, float]  # least and most
    measured: bool  # as fast as the model's last reading on this machine

    def __str__(self) -> str:
        least, most = map(format_seconds, self.seconds)
        reading = f"about {least if least == most else f'{least} to {most}'} to read"
        last = ", as fast as the last time" if self.measured else ""
        return f"about {format_bytes(self.memory_bytes)} of memory, {reading}{last}"


@click.command("plan")
@click.argument("paths", nargs=-1, metavar="PATH...", shell_complete=complete_paths)
@click.option(
    "--model",
    "-m",
    metavar="NAME|PATH",
    envvar="NSA_MODEL",
    show_envvar=True,
    shell_complete=complete_models,
    help="Whose tokens to count.",
)
@click.option(
    "--max-context",
    type=parse_tokens,
    metavar="TOKENS",
    envvar="NSA_MAX_CONTEXT",
    show_envvar=True,
    help="Most tokens of document, question and answer, such as 32k. Default: the model's limit.",
)
@click.option("--tree", "depth", type=click.IntRange(1), metavar="DEPTH", help="Sum the tokens by directory, so deep.")
@click.option("--no-cache", is_flag=True, help="Keep no token counts for the next time.")
@document_options
@packing_options
@json_option
@output_option
@verbosity_options
def command(paths, model, max_context, depth, no_cache, read, packing, as_json) -> None:
    """Show what a question about the files and folders at PATH would read: tokens per file, memory, time.

    Counts are exact, made with the model's own tokenizer. Memory and time are estimates: the time goes by the model's
    last reading on this machine, or, before there was one, by two cores of a new and of an older CPU. Exit code 4 if
    the documents do not fit.

    \b
      nsa plan src/
      nsa plan . --exclude tests --max-context 64k
      nsa plan . --tree 2
      nsa plan . --level 'tests=outline' --level 'docs=name'
      nsa plan . --json | jq -r '.files[] | "\\(.tokens) \\(.path)"' | sort -n
    """
    documents, skips = read_documents(paths_or_stdin(paths, read), read)
    checkpoint, request = Checkpoint(model), Request(max_context=max_context)
    room = room_beside(checkpoint, "", request, packing) - (0 if packing.reserve else QUESTION_TOKENS)
    grid = Grid(checkpoint.config.select_block, len(checkpoint.tokenizer.prompt("").before))
    with TokenCache(None if no_cache else cache_dir(), checkpoint.tokenizer) as tokens:
        context = pack_documents(documents, skips, tokens, packing, room, grid)
    cost = estimate(checkpoint, context.tokens)
    table = to_table(context, room, cost, depth)
    click.echo(json.dumps(to_json(checkpoint, context, room, cost)) if as_json else table)
    check_budget(context.tokens, room, context.files)


def estimate(checkpoint: Checkpoint, tokens: int) -> Cost:
    from nsa_models.cost import estimate_memory
    from nsa_models.formats import weights_bytes

    memory = estimate_memory(checkpoint.config, tokens, weights_bytes(checkpoint.directory))
    *seconds, measured = expected(cache_dir(), checkpoint, tokens)
    return Cost(memory, tuple(seconds), measured)


def to_table(context: Context, room: int, cost: Cost, depth: int | None) -> str:
    """Files by size, what was skipped by reason, and the sums."""
    width = len(f"{context.tokens:,}")
    listing = len(context.listing)
    rows = [(file.tokens, title(file)) for file in sorted(context.files, key=lambda file: -file.tokens)]
    if depth:
        rows = list(tree(context.files, depth))
    gaps = context.tokens - listing - sum(file.tokens for file in context.files)
    rows += [(gaps, "(empty lines that align files)")] * bool(gaps)
    rows += [(listing, "(the list of files)")] * bool(listing)
    rows += [(context.tokens, f"tokens in {len(context.files):,} file{'s' * (len(context.files) > 1)}")]
    lines = [f"{tokens:{width},}  {text}" for tokens, text in rows]
    if context.skips:
        lines += ["", "skipped:", *(f"  {skip.path}  {skip.reason}" for skip in context.skips)]
    verdict = "fits in" if context.tokens <= room else "does not fit in"
    return "\n".join(
        [
            *lines,
            "",
            f"{verdict} {room:,} tokens beside a question and its answer",
            str(cost),
        ]
    )


def to_json(checkpoint: Checkpoint, context: Context, room: int, cost: Cost) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": checkpoint.name,
        "files": [{"path": f.path, "tokens": f.tokens, "level": f.document.level} for f in context.files],
        "named": [document.path for document in context.documents if document.level == "name"],
        "skipped": [{"path": skip.path, "reason": skip.reason} for skip in context.skips],
        "tokens": context.tokens,
        "room": room,
        "fits": context.tokens <= room,
        "memory_bytes": cost.memory_bytes,
        "prefill_seconds": [round(seconds, 1) for seconds in cost.seconds],
        "measured": cost.measured,
    }
