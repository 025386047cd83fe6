"""`nsa plan`: what a question about documents would read and cost, without loading a model."""

import json
from dataclasses import dataclass

import click

from nsa_cli.answer import SCHEMA_VERSION, Request, document_room
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.options import json_option, output_option, paths_or_stdin, verbosity_options
from nsa_cli.completion import complete_models, complete_paths
from nsa_cli.context import Context, build_context, check_budget, parse_tokens
from nsa_cli.documents import read_documents
from nsa_cli.documents.options import document_options
from nsa_cli.units import format_bytes, format_seconds

QUESTION_TOKENS = 64  # kept free for a question that is not known yet
# Operations per second measured on 2 cores with AVX-512 bfloat16 and a C compiler. The softmax holds attention back.
LINEAR_RATE = 370e9
ATTENTION_RATE = 150e9


@dataclass(frozen=True)
class Cost:
    """Estimates for reading a context once; a stored one is read in no time."""

    memory_bytes: int
    prefill_seconds: float


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
@document_options
@json_option
@output_option
@verbosity_options
def command(paths, model, max_context, read, as_json) -> None:
    """Show what a question about the files and folders at PATH would read: tokens per file, memory, time.

    Counts are exact, made with the model's own tokenizer. Memory and time are estimates, the time one for two CPU
    cores. Exit code 4 if the documents do not fit.

    \b
      nsa plan src/
      nsa plan . --exclude tests --max-context 64k
      nsa plan . --json | jq -r '.files[] | "\\(.tokens) \\(.path)"' | sort -n
    """
    documents, skips = read_documents(paths_or_stdin(paths), read)
    checkpoint = Checkpoint(model)
    room = document_room(checkpoint, "", Request(max_context=max_context)) - QUESTION_TOKENS
    context = build_context(documents, checkpoint.tokenizer, skips)
    cost = estimate(checkpoint, context.tokens)
    click.echo(json.dumps(to_json(checkpoint, context, room, cost)) if as_json else to_table(context, room, cost))
    check_budget(context.tokens, room, context.files)


def estimate(checkpoint: Checkpoint, tokens: int) -> Cost:
    from nsa_models.cost import attention_operations, estimate_memory, linear_parameters
    from nsa_models.formats import weights_bytes

    config = checkpoint.config
    linear = 2 * linear_parameters(config) * tokens / LINEAR_RATE
    attention = attention_operations(config, tokens) / ATTENTION_RATE
    return Cost(estimate_memory(config, tokens, weights_bytes(checkpoint.directory)), linear + attention)


def to_table(context: Context, room: int, cost: Cost) -> str:
    """Files by size, what was skipped by reason, and the sums."""
    width = len(f"{context.tokens:,}")
    listing = len(context.listing)
    rows = [(file.tokens, file.path) for file in sorted(context.files, key=lambda file: -file.tokens)]
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
            f"about {format_bytes(cost.memory_bytes)} of memory, about {format_seconds(cost.prefill_seconds)} to read",
        ]
    )


def to_json(checkpoint: Checkpoint, context: Context, room: int, cost: Cost) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": checkpoint.name,
        "files": [{"path": file.path, "tokens": file.tokens} for file in context.files],
        "skipped": [{"path": skip.path, "reason": skip.reason} for skip in context.skips],
        "tokens": context.tokens,
        "room": room,
        "fits": context.tokens <= room,
        "memory_bytes": cost.memory_bytes,
        "prefill_seconds": round(cost.prefill_seconds, 1),
    }
