"""`nsa ask`: documents and questions in, answers out."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import click

from nsa_cli.commands.options import (
    output_option,
    paths_or_stdin,
    question_options,
    strict_option,
    verbosity_options,
)
from nsa_cli.commands.run import explicit
from nsa_cli.completion import complete_paths
from nsa_cli.documents import ReadOptions, read_documents
from nsa_cli.output import emit, say_skipped, silent
from nsa_cli.packing import Packing, pack, room_beside
from nsa_cli.recipe_keys import NAME
from nsa_cli.reply import Answer, require_citations, show
from nsa_cli.request import Request
from nsa_cli.summarize import ask_about
from nsa_models.errors import CheckError, InputError

FENCED = re.compile(r"^(?P<fence>`{3,}|~{3,})[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)


@click.command("ask")
@click.argument("arguments", nargs=-1, metavar="PATH... QUESTION", shell_complete=complete_paths)
@click.option(
    "--question", "asked", metavar="TEXT", multiple=True, help="A question, in place of the last argument; repeatable."
)
@click.option("--questions", metavar="FILE", help="A file with a question on each line; '-' = standard input.")
@click.option(
    "--schema", metavar="FILE|FIELDS", help="Answer in JSON of this schema: a file, or 'name, age int, tags str[]'."
)
@click.option(
    "--code", is_flag=True, help="Print only the first block of code in the answer; exit code 6 if it has none."
)
@click.option("--save-recipe", metavar="NAME", help="Answer nothing, but save question and options: nsa run NAME PATH.")
@strict_option
@question_options
@output_option
@verbosity_options
def command(
    arguments, asked, questions, schema, code, save_recipe, strict, read, packing, request, checkpoint, as_json
) -> None:
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
      nsa ask parser.py "write a test for parse_args" --code > test_parser.py
      nsa ask "list the TODO comments" --include '*.py' --save-recipe todos
      git ls-files -z '*.c' | nsa ask --files-from - -0 "which of these allocate?"
      nsa ask . "how is the cache invalidated?" --order importance --overflow drop
      nsa ask . "list the exit codes" --json | jq -r .answer
    """
    if code and schema:
        raise click.UsageError("--code and --schema are two kinds of answer; give one")
    wanted = [*asked, *(read_questions(questions) if questions else ())]
    if schema:
        from nsa_cli.schema import load_schema

        request = replace(request, schema=load_schema(schema))
    if save_recipe:
        save(save_recipe, arguments, wanted, request, read, packing)
        return
    paths, wanted = split_arguments(arguments, wanted, read)
    documents, skips = read_documents(paths, read)
    say_skipped(skips)
    longest = max(wanted, key=len)
    context = pack(documents, skips, checkpoint, longest, request, packing)
    room = room_beside(checkpoint, longest, request, packing)  # it is longer only where it is to be read in parts
    answered = ask_about(checkpoint, context, wanted, request, room, silent if as_json or code else emit)
    replies = show_answers(map(only_code, answered) if code else answered, wanted, as_json, told=not code)
    if strict:
        require_citations(replies)


def save(name: str, arguments, questions, request: Request, read: ReadOptions, packing: Packing) -> None:
    """Write the one question as a recipe, and print where it is."""
    from nsa_cli.saved import save_recipe

    if not re.fullmatch(NAME, name):
        raise click.UsageError(f"{name!r} is not a name for a recipe; write it like my-review")
    if len([*arguments, *questions]) != 1:
        raise click.UsageError("--save-recipe takes one question, and no paths: those are for nsa run")
    (question,) = (*arguments, *questions)
    click.echo(save_recipe(name, question, request, read, packing, explicit()))


def only_code(reply: Answer) -> Answer:
    """The same answer with its first fenced block of code for a text. Raises CheckError if it has none."""
    if reply.finish_reason == "interrupted":
        raise KeyboardInterrupt
    block = FENCED.search(reply.text)
    if block is None:
        raise CheckError(f"there is no block of code in the answer: {' '.join(reply.text.split())[:60]}")
    return replace(reply, text=block["code"])


def show_answers(answered: Iterator[Answer], questions: Sequence[str], as_json: bool, told: bool) -> list[Answer]:
    """Print the answers one after the other; several with their questions. told: their text is out already."""
    shown: list[Answer] = []
    for question in questions:
        if len(questions) > 1 and not as_json:
            emit("\n" * bool(shown) + f"## {question}\n\n")
        shown.append(next(answered))
        if not told and not as_json:
            emit(shown[-1].text)
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
