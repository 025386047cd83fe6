"""`nsa summarize`: documents in, a summary out."""

from dataclasses import replace

import click

from nsa_cli.answer import show, silent
from nsa_cli.commands.options import (
    answer_options,
    checkpoint_options,
    document_options,
    json_option,
    packing_options,
    paths_or_stdin,
    verbosity_options,
)
from nsa_cli.documents import read_documents
from nsa_cli.output import emit, say_skipped
from nsa_cli.packing import Packing, pack
from nsa_cli.summarize import summarize


@click.command("summarize")
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--focus", metavar="TEXT", help="What the summary should concentrate on.")
@document_options
@packing_options
@answer_options
@checkpoint_options
@json_option
@verbosity_options
def command(paths, focus, read, packing, request, checkpoint, as_json) -> None:
    """Summarize the files and folders at PATH, or text piped in (PATH `-`, or none).

    What fits the model is read in one pass. Longer text is read in parts, cut between files or lines, and the
    parts' summaries are summarized; stderr and `shards` in the JSON say so.

    \b
      nsa summarize book.txt
      nsa summarize src/ --focus "error handling" --max-tokens 300
      git log -50 | nsa summarize --json
    """
    documents, skips = read_documents(paths_or_stdin(paths, read), read)
    say_skipped(skips)
    context = pack(documents, skips, checkpoint, "", request, reads_in_parts(packing))
    reply = summarize(checkpoint, context, focus, request, silent if as_json else emit)
    show(reply, as_json)


def reads_in_parts(packing: Packing) -> Packing:
    """A summary of parts is what it does with what does not fit, unless that is to be outlined or dropped."""
    return packing if packing.overflow in ("outline", "drop") else replace(packing, overflow="shard")
