"""Options that commands share. Each decorator hands its command one value."""

import functools
import sys
from collections.abc import Sequence

import click

from nsa_cli.answer import Request
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.completion import complete_models
from nsa_cli.output import output_option, verbosity_options
from nsa_cli.units import parse_quantity
from nsa_models.sampling import Sampling

__all__ = [
    "answer_options",
    "checkpoint_options",
    "json_option",
    "output_option",
    "paths_or_stdin",
    "strict_option",
    "verbosity_options",
]


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
strict_option = click.option(
    "--strict", is_flag=True, help="Fail (exit code 6) if a quote or a path:line in the answer is not in the text."
)


def paths_or_stdin(paths: Sequence[str]) -> tuple[str, ...]:
    """The paths, or `-` where there are none; a usage error rather than waiting for someone to type a document."""
    if not paths and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no document: name a file or a folder, or pipe text in")
    return tuple(paths) or ("-",)


def checkpoint_options(command):
    """Add --model, --device and --threads; the command gets a `checkpoint`."""

    @functools.wraps(command)
    def with_checkpoint(*args, model, device, threads, **kwargs):
        return command(*args, checkpoint=Checkpoint(model, device, threads), **kwargs)

    return _add(
        with_checkpoint,
        _option(
            "--model",
            "-m",
            metavar="NAME|PATH",
            shell_complete=complete_models,
            help="Installed model or checkpoint directory.",
        ),
        _option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU if there is one."),
        _option("--threads", type=click.IntRange(1), help="CPU threads. Default: one per core."),
    )


def answer_options(command):
    """Add the options that say how to answer; the command gets a `request`."""

    @functools.wraps(command)
    def with_request(*args, stop, system, max_context, no_cache, evidence, **kwargs):
        sampling = Sampling(**{name: kwargs.pop(name) for name in Sampling.__dataclass_fields__})
        request = Request(sampling, stop, system, max_context, not no_cache, evidence)
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
        _option(
            "--max-context",
            type=parse_quantity,
            metavar="TOKENS",
            help="Most tokens of document, question and answer, such as 32k. Default: the model's limit.",
        ),
        click.option("--no-cache", is_flag=True, help="Neither use nor keep stored contexts."),
        _option("--evidence", type=click.IntRange(0), default=Request.evidence, help="Most places to name; 0 = none."),
    )


def _option(*names: str, **settings):
    """An option that can also be set as NSA_NAME; the help shows that, and the default."""
    variable = "NSA_" + names[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, show_default=True, **settings)


def _add(command, *options):
    for option in reversed(options):
        command = option(command)
    return command


def _not_empty(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("a stop string cannot be empty", context, parameter)
    return values
