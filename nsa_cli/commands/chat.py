"""`nsa chat`: a conversation about documents that are read once."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import click

from nsa_cli.commands.options import (
    answer_options,
    checkpoint_options,
    document_options,
    json_option,
    packing_options,
    paths_or_stdin,
    verbosity_options,
)
from nsa_cli.completion import complete_paths
from nsa_cli.documents import read_documents
from nsa_cli.output import say, say_skipped
from nsa_cli.packing import pack

PROMPT = "> "


@click.command("chat")
@click.argument("paths", nargs=-1, metavar="PATH...", shell_complete=complete_paths)
@click.option(
    "--session",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep the conversation in FILE, and go on with the one that is in it. A copy of FILE is a branch.",
)
@document_options
@packing_options
@answer_options
@checkpoint_options
@json_option
@verbosity_options
def command(paths, session, read, packing, request, checkpoint, as_json) -> None:
    """Talk about the files and folders at PATH: they are read once, and each question knows those before it.

    Questions come from the terminal, or a line each from a pipe. /undo takes the last question back, /reset begins a
    new conversation about the same text, /quit or Ctrl-D ends.

    \b
      nsa chat book.txt
      nsa chat src/ --system "Answer in one sentence."
      nsa chat book.txt --json < questions.txt
      echo "and then?" | nsa chat book.txt --session ada.jsonl
    """
    from nsa_cli.chat import HELP, begin, chat, load_turns, save_turns

    named = paths_or_stdin(paths, read)
    if "-" in named:
        raise click.UsageError("the questions come from standard input, so the text cannot; name a file or a folder")
    documents, skips = read_documents(named, read)
    say_skipped(skips)
    context = pack(documents, skips, checkpoint, "", request, packing)
    typed = sys.stdin is not None and sys.stdin.isatty()
    turns = load_turns(session, checkpoint.tokenizer) if session else []
    conversation = begin(checkpoint, context, request)
    conversation.resume(turns)
    if typed:
        say(f"nsa: {context.tokens:,} tokens read; {HELP}")
    if turns:
        say(f"nsa: going on after {len(turns):,} questions; the last: {turns[-1].question}")
    keep = partial(save_turns, session) if session else lambda turns: None
    chat(conversation, typed_lines() if typed else sys.stdin or (), as_json, typed, keep)


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
