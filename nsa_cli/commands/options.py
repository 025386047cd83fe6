"""Options that commands share. Each decorator hands its command one value."""

import codecs
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.completion import complete_models, complete_paths
from nsa_cli.documents import ReadOptions
from nsa_cli.documents.ignore import KINDS
from nsa_cli.documents.table import MAX_ROWS
from nsa_cli.output import output_option, verbosity_options
from nsa_cli.packing import LEVELS, ORDERS, OVERFLOWS, Packing
from nsa_cli.request import STORE_MODES, Request
from nsa_cli.text_file import read_text
from nsa_cli.units import format_bytes, parse_quantity
from nsa_models.errors import InputError
from nsa_models.sampling import Sampling

__all__ = [
    "answer_options",
    "checkpoint_options",
    "document_options",
    "json_option",
    "output_option",
    "model_option",
    "packing_options",
    "paths_or_stdin",
    "question_options",
    "strict_option",
    "verbosity_options",
]


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
strict_option = click.option(
    "--strict", is_flag=True, help="Fail (exit code 6) if a quote or a path:line in the answer is not in the text."
)


def paths_or_stdin(paths: Sequence[str], read: ReadOptions | None = None) -> tuple[str, ...]:
    """The paths, or `-` where nothing is named; a usage error rather than waiting for someone to type a document."""
    if read and (read.listed or read.diff or read.log):
        return tuple(paths)
    if read and read.revision:
        return tuple(paths) or (".",)
    if not paths and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no document: name a file or a folder, or pipe text in")
    return tuple(paths) or ("-",)


def document_options(command):
    """Add the options that say what is read; the command gets a `read`, a ReadOptions."""

    @functools.wraps(command)
    def reading(*args, files_from, null, no_gitignore, no_nsaignore, no_default_ignores, **kwargs):
        if kwargs["no_files"] and not (kwargs["diff"] or kwargs["log"]):
            raise click.UsageError("--no-files reads nothing but --diff or --log, and neither is given")
        own = {name: kwargs.pop(name) for name in ReadOptions.__dataclass_fields__ if name in kwargs}
        read = ReadOptions(
            **own,
            listed=read_list(files_from, null),
            gitignore=not no_gitignore,
            own_ignores=not no_nsaignore,
            default_ignores=not no_default_ignores,
        )
        return command(*args, read=read, **kwargs)

    pattern, flag = dict(metavar="PATTERN", multiple=True), dict(is_flag=True)
    size = format_bytes(ReadOptions.max_file_bytes)
    return _add(
        reading,
        click.option(
            "--include", **pattern, help="Read only matching files of directories: '*.py', docs, 'src/**/*.c'."
        ),
        click.option(
            "--exclude", **pattern, help="Leave matching files out: tests, '*.svg', /docs/old, as in .gitignore."
        ),
        click.option(
            "--files-from", metavar="FILE|-", help="Also read the files that FILE or stdin lists, one a line."
        ),
        click.option(
            "-0", "--null", **flag, help="In --files-from, names end in a NUL byte: find -print0, git ls-files -z."
        ),
        click.option("--rev", "revision", metavar="REV", help="Read files as they were in this git revision."),
        click.option("--diff", metavar="REV", help="Read git's diff of the work tree with REV, or of a range A..B."),
        click.option("--log", type=click.IntRange(1), metavar="N", help="Read git's log of the last N commits."),
        click.option("--no-files", **flag, help="Of the paths, read only what --diff and --log say about them."),
        click.option("--hidden", **flag, help="Also read hidden files; those that git tracks are read anyway."),
        click.option("--follow-links", **flag, help="Also read what symbolic links in directories lead to."),
        click.option("--submodules", **flag, help="Also read repositories inside a repository."),
        click.option("--no-gitignore", **flag, help="Also read what .gitignore and git's other excludes leave out."),
        click.option("--no-nsaignore", **flag, help="Also read what .nsaignore and .ignore leave out."),
        click.option("--no-default-ignores", **flag, help="Also read every KIND of --keep."),
        click.option(
            "--keep",
            type=click.Choice(KINDS),
            metavar="KIND",
            multiple=True,
            help=f"Also read what is left out as {', '.join(KINDS)}.",
        ),
        click.option(
            "--max-file-size",
            "max_file_bytes",
            metavar="BYTES",
            type=parse_quantity,
            default=str(ReadOptions.max_file_bytes),
            help=f"Skip larger files of directories: 500k, 2M. [default: {size}; PDF, EPUB, DOCX, RTF 64 MB]",
        ),
        click.option(
            "--encoding", metavar="NAME", callback=_known_encoding, help="Of text files: cp1252, utf-16, shift_jis."
        ),
        click.option(
            "--convert",
            metavar="PATTERN=COMMAND",
            multiple=True,
            callback=_converters,
            help="Read of matching files what COMMAND prints: '*.doc=antiword', '*.tex=pandoc -t plain {}'.",
        ),
        click.option(
            "--all-rows", **flag, help=f"Read all of a CSV, TSV or JSONL file, not its first {MAX_ROWS} rows."
        ),
    )


def read_list(file: str | None, null: bool) -> tuple[str, ...]:
    """The names in a file, or on stdin for `-`, one a line or each before a NUL byte."""
    if not file:
        if null:
            raise click.UsageError("-0 says how --files-from is written, which is not given")
        return ()
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {(error.strerror or str(error)).lower()}") from None
    names = os.fsdecode(data).split("\0") if null else os.fsdecode(data).splitlines()
    names = tuple(name for name in names if name.strip())
    if not names:
        raise InputError(f"{'<stdin>' if file == '-' else file}: lists no files")
    return names


def packing_options(command):
    """Add the options that say how documents become a context; the command gets a `packing`."""

    @functools.wraps(command)
    def with_packing(*args, **kwargs):
        own = {name: kwargs.pop(name) for name in Packing.__dataclass_fields__}
        return command(*args, packing=Packing(**own), **kwargs)

    return _add(
        with_packing,
        _option(
            "--order", type=click.Choice(ORDERS), default=Packing.order, help="Of files; what matters most comes last."
        ),
        click.option(
            "--prefer",
            metavar="PATTERN",
            multiple=True,
            help="Matching files matter most, those of an earlier pattern the more: come last, and are dropped last.",
        ),
        click.option(
            "--level",
            "levels",
            metavar="PATTERN=LEVEL",
            multiple=True,
            callback=_levels,
            help="full, code (no comments), outline (definitions, headings) or name for matching files; the first "
            "match counts.",
        ),
        _option(
            "--overflow",
            type=click.Choice(OVERFLOWS),
            help="Where files do not fit: error, read in parts (shard), outline or drop what matters least. Default: "
            "error; summarize and run read in parts.",
        ),
        _option("--reserve", type=parse_quantity, metavar="TOKENS", help="Keep so much free for question and answer."),
        click.option("--align", is_flag=True, help="Begin files where a block of the model's attention begins."),
    )


def checkpoint_options(command):
    """Add --model, --device, --threads, --dtype and --chat-template; the command gets a `checkpoint`."""

    @functools.wraps(command)
    def with_checkpoint(*args, model, device, threads, dtype, chat_template, **kwargs):
        template = "" if chat_template == "none" else chat_template and read_text(chat_template)
        return command(*args, checkpoint=Checkpoint(model, device, threads, dtype, template), **kwargs)

    return _add(
        with_checkpoint,
        model_option("Installed model or checkpoint directory."),
        _option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU if there is one."),
        _option("--threads", type=click.IntRange(1), help="CPU threads. Default: one per core."),
        _option(
            "--dtype",
            type=click.Choice(["bfloat16", "float32"]),
            help="To compute in. Default: bfloat16 where the machine multiplies it fast.",
        ),
        _option(
            "--chat-template",
            metavar="FILE|none",
            shell_complete=complete_paths,
            help="Jinja template in place of the checkpoint's own; none: document, Question:, Answer:.",
        ),
    )


def answer_options(command):
    """Add the options that say how to answer; the command gets a `request`."""

    @functools.wraps(command)
    def with_request(*args, stop, system, system_file, max_context, fit, cache, no_cache, evidence, reread, **kwargs):
        sampling = Sampling(**{name: kwargs.pop(name) for name in Sampling.__dataclass_fields__})
        if system_file:
            system = read_text(system_file)
        store = "off" if no_cache else cache
        request = Request(sampling, stop, system, max_context, store, evidence, reread, fit=fit)
        return command(*args, request=request, **kwargs)

    default, share = Sampling(), click.FloatRange(0, 1)
    return _add(
        with_request,
        _option("--max-tokens", type=click.IntRange(1), default=default.max_tokens, help="Longest answer."),
        _option("--temperature", type=click.FloatRange(0, 100), default=default.temperature, help="0 = greedy."),
        _option("--top-p", type=share, default=default.top_p, help="Keep the likeliest tokens up to this mass."),
        _option("--top-k", type=click.IntRange(0), default=default.top_k, help="Keep the k likeliest; 0 = all."),
        _option("--min-p", type=share, default=default.min_p, help="Keep tokens this likely against the likeliest."),
        _option(
            "--repeat-penalty",
            type=click.FloatRange(0, 100, min_open=True),
            default=default.repeat_penalty,
            help="Above 1, the answer repeats itself less.",
        ),
        _option("--seed", type=click.IntRange(0, 2**63 - 1), default=default.seed, help="Of the sampling."),
        click.option("--stop", multiple=True, callback=_not_empty, help="End the answer before this text; repeatable."),
        _option("--system", help="System message, in place of the chat template's own."),
        click.option("--system-file", metavar="FILE", shell_complete=complete_paths, help="The same, from a file."),
        _option(
            "--max-context",
            type=parse_quantity,
            metavar="TOKENS",
            help="Most tokens of document, question and answer, such as 32k. Default: the model's limit.",
        ),
        click.option("--fit", is_flag=True, help="Let the context be no longer than free memory holds."),
        _option(
            "--cache",
            type=click.Choice(STORE_MODES),
            default=Request.store,
            help="Stored contexts: use and keep them, only read them, read documents anew (refresh), or off.",
        ),
        click.option("--no-cache", is_flag=True, help="Neither use nor keep stored contexts: --cache off."),
        _option("--evidence", type=click.IntRange(0), default=Request.evidence, help="Most places to name; 0 = none."),
        _option(
            "--reread",
            type=click.IntRange(0),
            metavar="TOKENS",
            help="Answer from so much of a longer text: passages of some 200, around the places that the question "
            "leads to; 0 = from all of it. Default: what the model is best at; summarize and run: 0.",
        ),
    )


def question_options(command):
    """Add what every command that asks a model about documents takes: it gets a `read`, a `packing`, a `request`, a
    `checkpoint` and `as_json`.
    """
    for add in (json_option, checkpoint_options, answer_options, packing_options, document_options):
        command = add(command)
    return command


def model_option(help: str):
    """--model; the command gets its name or path, or None."""
    return _option("--model", "-m", metavar="NAME|PATH", shell_complete=complete_models, help=help)


def _option(*names: str, **settings):
    """An option that can also be set as NSA_NAME; the help shows that, and the default."""
    variable = "NSA_" + names[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, show_default=True, **settings)


def _add(command, *options):
    for option in reversed(options):
        command = option(command)
    return command


def _known_encoding(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    try:
        # Some codecs, such as rot13 and zip, are none of text.
        return codecs.lookup(name).name if name and isinstance(b"a".decode(name, "replace"), str) else None
    except (LookupError, UnicodeError):
        raise click.BadParameter(f"no encoding {name!r}; try utf-8, cp1252, shift_jis or gb18030") from None


def _levels(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = tuple((pattern, level) for pattern, _, level in (value.rpartition("=") for value in values))
    for pattern, level in pairs:
        if not pattern or level not in LEVELS:
            raise click.BadParameter(f"write PATTERN=LEVEL with a level of {', '.join(LEVELS)}: 'tests=outline'")
    return pairs


def _converters(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found = []
    for value in values:
        pattern, _, line = value.partition("=")
        try:
            command = tuple(shlex.split(line))
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: {str(error).lower()}") from None
        if not pattern or not command:
            raise click.BadParameter("write PATTERN=COMMAND: '*.doc=antiword'")
        if not shutil.which(command[0]):
            raise click.BadParameter(f"no program {command[0]!r}")
        found.append((pattern, command))
    return tuple(found)


def _not_empty(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("a stop string cannot be empty", context, parameter)
    return values
