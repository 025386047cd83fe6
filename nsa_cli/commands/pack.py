"""`nsa pack`: the text that a model would read, for other programs; no model runs."""

import os
from pathlib import Path

import click

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.options import document_options, packing_options, paths_or_stdin, verbosity_options
from nsa_cli.context import Context, Grid, check_budget, parse_tokens
from nsa_cli.documents import Document, Skip, read_documents
from nsa_cli.export import FORMATS, export
from nsa_cli.order import in_order
from nsa_cli.output import emit, say, say_skipped, write_atomically
from nsa_cli.packing import Packing, at_level, pack_documents
from nsa_cli.settings import cache_dir
from nsa_cli.token_cache import TokenCache
from nsa_models.errors import InputError, ModelError

NO_LIMIT = 1 << 62


@click.command("pack")
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--output", "-o", metavar="FILE", help="Write to FILE, whole or not at all; - is stdout.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True, help="Of the text.")
@click.option("--line-numbers", "-n", is_flag=True, help="Put the file's line number before each line.")
@click.option("--model", "-m", metavar="NAME|PATH", envvar="NSA_MODEL", show_envvar=True, help="Whose tokens to count.")
@click.option("--max-context", type=parse_tokens, metavar="TOKENS", help="Most tokens of the text. Default: no limit.")
@click.option("--no-cache", is_flag=True, help="Keep no token counts for the next time.")
@document_options
@packing_options
@verbosity_options
def command(paths, output, form, line_numbers, model, max_context, no_cache, read, packing) -> None:
    """Write the files and folders at PATH as one text, as a question about them would read it.

    Runs no model. Tokens are counted where a model is installed; --max-context, --overflow and --align need one.
    Exit code 4, and nothing written, if the text is longer than --max-context.

    \b
      nsa pack src/ -o src.txt
      nsa pack . --format markdown --exclude tests | pbcopy
      nsa pack . --max-context 32k --overflow outline --order importance
      nsa pack book.epub --format json | jq -r '.files[0].parts[].label'
    """
    documents, skips = read_documents(paths_or_stdin(paths, read), read)
    documents = without(documents, output)
    say_skipped(skips)
    context = count(documents, skips, model, max_context, packing, None if no_cache else cache_dir())
    if context:
        documents, skips = context.documents, context.skips
    else:
        documents = in_order([at_level(document, packing.levels) for document in documents], packing.order)
    text = export(documents, skips, form, line_numbers)
    if output and output != "-":
        write_atomically(output, text.encode(errors="replace"))
    else:
        emit(text)
    tokens = f"{context.tokens:,} tokens" if context else f"{len(text):,} characters"
    say(f"{tokens} in {len(documents):,} file{'s' * (len(documents) > 1)}")


def count(
    documents: list[Document],
    skips: list[Skip],
    model: str | None,
    limit: int | None,
    packing: Packing,
    directory: Path | None,
) -> Context | None:
    """The context of the documents; None where no model is installed to count tokens with, and nothing needs one.

    directory: where counts are kept; None = nowhere.
    """
    checkpoint = Checkpoint(model)
    try:
        tokenizer = checkpoint.tokenizer
    except ModelError:
        if model or limit or packing.align:
            raise
        return None
    room = limit - (packing.reserve or 0) if limit else NO_LIMIT
    grid = Grid(checkpoint.config.select_block, len(tokenizer.prompt("").before))
    with TokenCache(directory, tokenizer) as tokens:
        context = pack_documents(documents, skips, tokens, packing, room, grid)
    check_budget(context.tokens, room, context.files)
    return context


def without(documents: list[Document], output: str | None) -> list[Document]:
    """Not what an earlier run wrote, which lies in the folder that is packed."""
    if not output or output == "-":
        return documents
    own = os.path.realpath(output)
    kept = [d for d in documents if d.source is None or os.path.realpath(d.source) != own]
    if not kept:
        raise InputError(f"{output}: is the only file to pack, and would be written over")
    return kept
