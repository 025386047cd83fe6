"""`nsa ask`: documents and a question in, an answer out."""

import os

import click

from nsa_cli.answer import answer, show, silent
from nsa_cli.commands.options import (
    answer_options,
    checkpoint_options,
    json_option,
    output_option,
    paths_or_stdin,
    verbosity_options,
)
from nsa_cli.completion import complete_paths
from nsa_cli.context import build_context
from nsa_cli.documents import read_documents
from nsa_cli.documents.options import document_options
from nsa_cli.output import emit, say_skipped


@click.command("ask")
@click.argument("arguments", nargs=-1, metavar="PATH... QUESTION", shell_complete=complete_paths)
@document_options
@answer_options
@checkpoint_options
@json_option
@output_option
@verbosity_options
def command(arguments, read, request, checkpoint, as_json) -> None:
    """Answer QUESTION about the files and folders at PATH, or about text piped in (PATH `-`, or none).

    The answer goes to stdout as it is generated; where the question leads (path:lines, and how many times an even
    share of attention they drew) and timings go to stderr. What was read is stored: the next question about it starts
    at once.

    \b
      nsa ask src/ "where is the retry policy set?"
      nsa ask book.txt notes/ "who is Ada?" --max-tokens 100
      git diff | nsa ask "what does this change?"
      nsa ask . "list the exit codes" --json | jq -r .answer
    """
    paths, question = split_arguments(arguments)
    documents, skips = read_documents(paths, read)
    say_skipped(skips)
    context = build_context(documents, checkpoint.tokenizer, skips)
    reply = answer(checkpoint, context, question, request, silent if as_json else emit)
    show(reply, as_json)


def split_arguments(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The paths, and the question that comes last."""
    *paths, question = arguments or ("",)
    if question == "-" or os.path.exists(question):
        raise click.UsageError(f"a question is missing: {question!r} is a path; the question comes last, in quotes")
    if not question.strip():
        raise click.UsageError('a question is missing, such as: nsa ask src/ "where is the retry policy set?"')
    return paths_or_stdin(paths), question
