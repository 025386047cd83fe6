"""`nsa summarize`: documents in, a summary out."""

from dataclasses import replace

import click
from click.core import ParameterSource

from nsa_cli.commands.options import (
    output_option,
    paths_or_stdin,
    question_options,
    strict_option,
    verbosity_options,
)
from nsa_cli.completion import complete_paths
from nsa_cli.documents import read_documents
from nsa_cli.output import emit, say, say_skipped, silent
from nsa_cli.packing import pack, reads_in_parts
from nsa_cli.reply import Answer, require_citations, show
from nsa_cli.summarize import JOIN, LENGTHS, STYLES, WHOLE, Wish, summarize


class Length(click.ParamType):
    """One of LENGTHS, or a number of words."""

    name = "length"

    def convert(self, value, parameter, context):
        if isinstance(value, int) or value in LENGTHS:
            return value
        if value.isascii() and value.isdecimal() and 1 <= int(value) <= 100_000:
            return int(value)
        return self.fail(f"{value!r} is neither {', '.join(LENGTHS)} nor a number of words", parameter, context)


@click.command("summarize")
@click.argument("paths", nargs=-1, metavar="PATH...", shell_complete=complete_paths)
@click.option("--focus", metavar="TEXT", help="What the summary should concentrate on.")
@click.option("--length", type=Length(), metavar="LENGTH|WORDS", help="short, medium, long, or a number of words.")
@click.option("--style", type=click.Choice(list(STYLES)), help="How it is written.")
@click.option("--per", type=click.Choice(["chapter", "file"]), help="A summary for each, under its heading.")
@strict_option
@question_options
@output_option
@verbosity_options
def command(paths, focus, length, style, per, strict, read, packing, request, checkpoint, as_json) -> None:
    """Summarize the files and folders at PATH, or text piped in (PATH `-`, or none).

    What fits the model is read in one pass. Longer text is read in parts, cut between files or lines, and the
    parts' summaries are summarized; stderr and `shards` in the JSON say so. Length and style are asked of the model;
    many words also raise --max-tokens where it is not given. Chapters are found by their headings.

    \b
      nsa summarize book.txt
      nsa summarize book.txt --per chapter --length short
      nsa summarize src/ --focus "error handling" --style bullets
      git log -50 | nsa summarize --length 100 --json
    """
    wish = Wish(focus, length, style)
    typed = click.get_current_context().get_parameter_source("max_tokens") is ParameterSource.COMMANDLINE
    if wish.max_tokens() > request.sampling.max_tokens and not typed:
        request = replace(request, sampling=replace(request.sampling, max_tokens=wish.max_tokens()))
    documents, skips = read_documents(paths_or_stdin(paths, read), read)
    say_skipped(skips)
    context = pack(documents, skips, checkpoint, "", request, reads_in_parts(packing))
    replies = show_summaries(checkpoint, context, wish, per, request.of_all(), as_json)
    if strict:
        require_citations(replies)


def show_summaries(checkpoint, context, wish: Wish, per: str | None, request, as_json: bool) -> list[Answer]:
    """Print the summary; or those of all files or chapters, with their names."""
    from nsa_cli.parts import parts

    pieces = parts(context, per or "document", max_tokens=1 << 62)  # a part that is too long is summarized in parts
    shown: list[Answer] = []
    tell = silent if as_json else emit
    for number, part in enumerate(pieces, 1):
        if per and as_json:
            say(f"nsa: {number} of {len(pieces)}: {part.label}, {len(part.context.ids):,} tokens")
        elif per:
            emit("\n" * bool(shown) + f"## {part.label}\n\n")
        shown.append(summarize(checkpoint, part.context, request, tell, wish.wording(WHOLE), wish.wording(JOIN)))
        show(shown[-1], as_json, **({"part": part.label} if per else {}))
    return shown
