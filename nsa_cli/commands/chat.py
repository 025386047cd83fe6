"""`nsa chat`: a conversation about documents that are read once."""

import sys
from collections.abc import Iterator
from contextlib import suppress

import click

from nsa_cli.commands.options import answer_options, checkpoint_options, json_option, verbosity_options
from nsa_cli.context import build_context
from nsa_cli.documents import read_documents
from nsa_cli.documents.options import document_options
from nsa_cli.output import say, say_skipped

PROMPT = "> "


@click.command("chat")
@click.argument("paths", nargs=-1, metavar="PATH...", required=True)
@document_options
@answer_options
@checkpoint_options
@json_option
@verbosity_options
def command(paths, read, request, checkpoint, as_json) -> None:
    """Talk about the files and folders at PATH: they are read once, and each question knows those before it.

    Questions come from the terminal, or a line each from a pipe. /reset begins a new conversation about the same text,
    /quit or Ctrl-D ends.

    \b
      nsa chat book.txt
      nsa chat src/ --system "Answer in one sentence."
      printf 'who is Ada?\nwhere does she live?\n' | nsa chat book.txt --json
    """
    from nsa_cli.chat import HELP, begin, chat

    if "-" in paths:
        raise click.UsageError("the questions come from standard input, so the text cannot; name a file")
    documents, skips = read_documents(paths, read)
    say_skipped(skips)
    context = build_context(documents, checkpoint.tokenizer, skips)
    typed = sys.stdin is not None and sys.stdin.isatty()
    conversation = begin(checkpoint, context, request)
    if typed:
        say(f"nsa: {context.tokens:,} tokens read; {HELP}")
    chat(conversation, typed_lines() if typed else sys.stdin or (), as_json, patient=typed)


def typed_lines() -> Iterator[str]:
    """What someone types, with the terminal's line editing, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            say("")
            return
