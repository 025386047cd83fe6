"""`nsa chat`: a conversation about documents that are read once."""

import sys
from collections.abc import Iterator
from contextlib import suppress

import click

from nsa_cli.commands.options import (
    paths_or_stdin,
    question_options,
    verbosity_options,
)
from nsa_cli.completion import complete_paths
from nsa_cli.documents import read_documents
from nsa_cli.output import say, say_skipped
from nsa_cli.packing import pack

PROMPT = "> "


@click.command("chat")
@click.argument("paths", nargs=-1, metavar="PATH...", shell_complete=complete_paths)
@question_options
@verbosity_options
def command(paths, read, packing, request, checkpoint, as_json) -> None:
    """Talk about the files and folders at PATH: they are read once, and each question knows those before it.

    Questions come from the terminal, or a line each from a pipe. /reset begins a new conversation about the same text,
    /quit or Ctrl-D ends.

    \b
      nsa chat book.txt
      nsa chat src/ --system "Answer in one sentence."
      nsa chat book.txt --json < questions.txt
    """
    from nsa_cli.chat import HELP, begin, chat

    named = paths_or_stdin(paths, read)
    if "-" in named:
        raise click.UsageError("the questions come from standard input, so the text cannot; name a file or a folder")
    documents, skips = read_documents(named, read)
    say_skipped(skips)
    context = pack(documents, skips, checkpoint, "", request, packing)
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
