"""`nsa ask`: documents and a question in, an answer out."""

import os

import click

from nsa_cli.answer import answer, show, silent
from nsa_cli.commands.options import (
    answer_options,
    checkpoint_options,
    document_options,
    json_option,
    packing_options,
    paths_or_stdin,
    verbosity_options,
)
from nsa_cli.documents import ReadOptions, read_documents
from nsa_cli.output import emit, say_skipped
from nsa_cli.packing import pack, room_beside
from nsa_cli.summarize import summarize

JOIN_ANSWERS = "The texts above answer a question from consecutive parts of one document. Answer it from them all: "


@click.command("ask")
@click.argument("arguments", nargs=-1, metavar="PATH... QUESTION")
@document_options
@packing_options
@answer_options
@checkpoint_options
@json_option
@verbosity_options
def command(arguments, read, packing, request, checkpoint, as_json) -> None:
    """Answer QUESTION about the files and folders at PATH, or about text piped in (PATH `-`, or none).

    The answer goes to stdout as it is generated; where the question leads (path:lines, and how many times an even
    share of attention they drew) and timings go to stderr. What was read is stored: the next question about it starts
    at once.

    \b
      nsa ask src/ "where is the retry policy set?"
      nsa ask book.txt notes/ "who is Ada?" --max-tokens 100
      nsa ask book.pdf "what does chapter 3 conclude?"
      nsa ask --diff main "review this change"
      git ls-files -z '*.c' | nsa ask --files-from - -0 "which of these allocate?"
      nsa ask . "how is the cache invalidated?" --order importance --overflow drop
      nsa ask . "list the exit codes" --json | jq -r .answer
    """
    paths, question = split_arguments(arguments, read)
    documents, skips = read_documents(paths, read)
    say_skipped(skips)
    context = pack(documents, skips, checkpoint, question, request, packing)
    tell = silent if as_json else emit
    if context.tokens > room_beside(checkpoint, question, request, packing):  # only where it is to be read in parts
        reply = summarize(checkpoint, context, None, request, tell, question, JOIN_ANSWERS + question)
    else:
        reply = answer(checkpoint, context, question, request, tell)
    show(reply, as_json)


def split_arguments(arguments: tuple[str, ...], read: ReadOptions) -> tuple[tuple[str, ...], str]:
    """The paths, and the question that comes last."""
    *paths, question = arguments or ("",)
    if question == "-" or os.path.exists(question):
        raise click.UsageError(f"a question is missing: {question!r} is a path; the question comes last, in quotes")
    if not question.strip():
        raise click.UsageError('a question is missing, such as: nsa ask src/ "where is the retry policy set?"')
    return paths_or_stdin(paths, read), question
