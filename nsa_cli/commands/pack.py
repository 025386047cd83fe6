"""`nsa pack`: the text that a model would read, for other programs; no model runs."""

import os
import re
from dataclasses import replace
from pathlib import Path

import click

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.options import document_options, model_option, packing_options, paths_or_stdin, verbosity_options
from nsa_cli.context import Context, Grid, check_budget, parse_tokens
from nsa_cli.documents import Document, Skip, read_documents
from nsa_cli.export import FORMATS, export
from nsa_cli.order import in_order
from nsa_cli.output import emit, say, say_skipped, warn, write_atomically
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
@model_option("Whose tokens to count.")
@click.option("--max-context", type=parse_tokens, metavar="TOKENS", help="Most tokens of the text. Default: no limit.")
@click.option("--no-cache", is_flag=True, help="Keep no token counts for the next time.")
@document_options
@packing_options
@verbosity_options
def command(paths, output, form, line_numbers, model, max_context, no_cache, read, packing) -> None:
    """Write the files and folders at PATH as one text, as a question about them would read it.

    Runs no model. Tokens are counted where a model is installed; --max-context, --overflow and --align need one.
    Exit code 4, and nothing written, if the text is longer than --max-context; `--overflow shard -o src.txt` cuts it
    into src.1.txt, src.2.txt and so on, none of them longer.

    \b
      nsa pack src/ -o src.txt
      nsa pack . --format markdown --exclude tests | pbcopy
      nsa pack . --max-context 32k --overflow outline --order importance
      nsa pack . --max-context 32k --overflow shard -o repo.txt
      nsa pack book.epub --format json | jq -r '.files[0].parts[].label'
    """
    documents, skips = read_documents(paths_or_stdin(paths, read), read)
    documents = without(documents, output)
    say_skipped(skips)
    room = max_context - (packing.reserve or 0) if max_context else NO_LIMIT
    context = count(documents, skips, model, room, packing, None if no_cache else cache_dir())
    if context:
        documents, skips = context.documents, context.skips
    else:
        documents = in_order(
            [at_level(document, packing.levels) for document in documents], packing.order, packing.prefer
        )
    size = f"{context.tokens:,} tokens in {counted(documents)}" if context else ""
    if context and context.tokens > room:
        parts = [[file.held() for file in part.files] for part in context.split(room)]
        texts = [export(part, skips, form, line_numbers, listed=False) for part in parts]
        say(f"{size}, in {len(parts)} parts: {write_parts(output, texts)}")
        return
    text = export(documents, skips, form, line_numbers)
    if is_file(output):
        write_atomically(output, text.encode(errors="replace"))
    else:
        emit(text)
    say(size or f"{len(text):,} characters in {counted(documents)}")


def counted(documents: list[Document]) -> str:
    return f"{len(documents):,} file{'s' * (len(documents) > 1)}"


def is_file(output: str | None) -> bool:
    return output not in (None, "", "-")


def count(
    documents: list[Document],
    skips: list[Skip],
    model: str | None,
    room: int,
    packing: Packing,
    directory: Path | None,
) -> Context | None:
    """The context of the documents, of more than `room` tokens only where it is to be cut; None where no model is
    installed to count tokens with, and nothing needs one.

    directory: where counts are kept; None = nowhere.
    """
    checkpoint = Checkpoint(model)
    try:
        tokenizer = checkpoint.tokenizer
    except ModelError:
        if model or room < NO_LIMIT or packing.align:
            raise
        return None
    grid = Grid(checkpoint.config.select_block, len(tokenizer.prompt("").before))
    with TokenCache(directory, tokenizer) as tokens:
        context = pack_documents(documents, skips, tokens, packing, room, grid)
    if packing.overflow != "shard":
        check_budget(context.tokens, room, context.files)
    return replace(context, tokenizer=tokenizer)


def write_parts(output: str | None, texts: list[str]) -> str:
    """Write `out/src.1.txt` and so on for `out/src.txt`, and say so."""
    if not is_file(output):
        raise click.UsageError(f"the text does not fit, and {len(texts)} parts of it need -o FILE to be told apart")
    stem, suffix = os.path.splitext(output)
    for number, text in enumerate(texts, 1):
        write_atomically(f"{stem}.{number}{suffix}", text.encode(errors="replace"))
    if os.path.exists(stale := f"{stem}.{len(texts) + 1}{suffix}"):
        warn(f"{stale} is from an earlier run, and none of these parts")
    return f"{stem}.1{suffix} to {stem}.{len(texts)}{suffix}"


def without(documents: list[Document], output: str | None) -> list[Document]:
    """Not what an earlier run wrote, which lies in the folder that is packed."""
    if not is_file(output):
        return documents
    whole = os.path.realpath(output)
    stem, suffix = os.path.splitext(whole)
    own = re.compile(rf"{re.escape(stem)}(\.\d+)?{re.escape(suffix)}")
    kept = [d for d in documents if d.source is None or not own.fullmatch(os.path.realpath(d.source))]
    if not kept:
        raise InputError(f"{output}: is the only file to pack, and would be written over")
    return kept
