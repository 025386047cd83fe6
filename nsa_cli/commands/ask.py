"""`nsa ask`: documents and questions in, answers out."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import click

from nsa_cli.answer import Answer, answers, require_citations, show, silent
from nsa_cli.commands.options import (
    output_option,
    paths_or_stdin,
    question_options,
    strict_option,
    verbosity_options,
)
from nsa_cli.completion import complete_paths
from nsa_cli.documents import ReadOptions, read_documents
from nsa_cli.output import emit, say_skipped
from nsa_cli.packing import pack, room_beside
from nsa_cli.summarize import answer_in_parts
from nsa_models.errors import InputError


@click.command("ask")
@click.argument("arguments", nargs=-1, metavar="PATH... QUESTION", shell_complete=complete_paths)
@click.option(
    "--question", "asked", metavar="TEXT", multiple=True, help="A question, in place of the last argument; repeatable."
)
@click.option("--questions", metavar="FILE", help="A file with a question on each line; '-' = standard input.")
@click.option(
    "--schema", metavar="FILE|FIELDS", help="Answer in JSON of this schema: a file, or 'name, age int, tags str[]'."
)
@strict_option
@question_options
@output_option
@verbosity_options
def command(arguments, asked, questions, schema, strict, read, packing, request, checkpoint, as_json) -> None:
    """Answer QUESTION about the files and folders at PATH, or about text piped in (PATH `-`, or none).

    The answer goes to stdout as it is generated; where the question leads (path:lines, and how many times an even
    share of attention they drew), whether the text holds what the answer quotes, and timings go to stderr. What was
    read is stored: the next question about it starts at once. Several questions share one reading; each answer then
    has a heading, or is a JSON object on a line of its own.

    \b
      nsa ask src/ "where is the retry policy set?"
      nsa ask book.txt notes/ "who is Ada?" --max-tokens 100
      nsa ask book.txt --question "who is Ada?" --question "where does she live?"
      nsa ask invoice.pdf "who is paid, and how much?" --schema "name, amount float"
      nsa ask --diff main "review this change"
      git ls-files -z '*.c' | nsa ask --files-from - -0 "which of these allocate?"
      nsa ask . "how is the cache invalidated?" --order importance --overflow drop
      nsa ask . "list the exit codes" --json | jq -r .answer
    """
    paths, wanted = split_arguments(arguments, [*asked, *(read_questions(questions) if questions else ())], read)
    if schema:
        from nsa_cli.schema import load_schema

        request = replace(request, schema=load_schema(schema))
    documents, skips = read_documents(paths, read)
    say_skipped(skips)
    longest = max(wanted, key=len)
    context = pack(documents, skips, checkpoint, longest, request, packing)
    in_parts = context.tokens > room_beside(checkpoint, longest, request, packing)  # only where it is to be read so
    answered = (answers_in_parts if in_parts else answers)(
        checkpoint, context, wanted, request, silent if as_json else emit
    )
    replies = show_answers(answered, wanted, as_json)
    if strict:
        require_citations(replies)


def answers_in_parts(checkpoint, context, questions: Sequence[str], request, tell) -> Iterator[Answer]:
    """Each question asked about every part, and the answers put together."""
    for question in questions:
        yield answer_in_parts(checkpoint, context, question, request, tell)


def show_answers(answered: Iterator[Answer], questions: Sequence[str], as_json: bool) -> list[Answer]:
    """Print the answers one after the other; several with their questions."""
    shown: list[Answer] = []
    for question in questions:
        if len(questions) > 1 and not as_json:
            emit("\n" * bool(shown) + f"## {question}\n\n")
        shown.append(next(answered))
        show(shown[-1], as_json, **({"question": question} if len(questions) > 1 else {}))
    return shown


def split_arguments(
    arguments: tuple[str, ...], questions: Sequence[str], read: ReadOptions
) -> tuple[tuple[str, ...], list[str]]:
    """The paths, and the questions: those of the options, or else the one that comes last."""
    if questions:
        if not all(question.strip() for question in questions):
            raise click.UsageError("a question is empty")
        return paths_or_stdin(arguments, read), list(questions)
    *paths, question = arguments or ("",)
    if question == "-" or os.path.exists(question):
        raise click.UsageError(f"a question is missing: {question!r} is a path; the question comes last, in quotes")
    if not question.strip():
        raise click.UsageError('a question is missing, such as: nsa ask src/ "where is the retry policy set?"')
    return paths_or_stdin(paths, read), [question]


def read_questions(file: str) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        with click.open_file(file, encoding="utf-8") as lines:
            found = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {(getattr(error, 'strerror', None) or 'not UTF-8').lower()}") from None
    if not found:
        raise InputError(f"{file}: no questions in it")
    return found
