"""`nsa bench`: how fast this machine reads and answers, against dense attention and its own matrix rate."""

import json

import click

from nsa_cli import bench
from nsa_cli.commands.bench_goals import command as goals
from nsa_cli.commands.bench_kernels import command as kernels
from nsa_cli.commands.options import checkpoint_options, json_option, verbosity_options
from nsa_cli.output import progress
from nsa_cli.units import parse_quantity


def parse_lengths(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    return sorted({parse_quantity(length) for length in value.split(",")})


@click.group("bench", invoke_without_command=True)
@click.option(
    "--lengths",
    default="2k,8k,32k",
    show_default=True,
    callback=parse_lengths,
    metavar="TOKENS,...",
    help="How much to read, such as 8k,32Ki.",
)
@click.option(
    "--decode", "decode_tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens to generate."
)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Prefills per length.")
@click.option("--dense/--no-dense", default=True, help="Also measure dense attention over the same weights.")
@click.option(
    "--dense-max",
    type=parse_quantity,
    default="32k",
    show_default=True,
    metavar="TOKENS",
    help="Longest length for dense attention.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False),
    help="File to read, repeated as needed. Default: the sources of Python's standard library.",
)
@checkpoint_options
@json_option
@verbosity_options
@click.pass_context
def command(context, lengths, decode_tokens, repeat, dense, dense_max, text, checkpoint, as_json) -> None:
    """Measure prefill and decode speed, beside dense attention with the same weights and the machine's matrix rate.

    Rates are medians, with the 10th and 90th percentile in brackets. "of matrix rate" is the prefill's operations per
    second over those of a 2048 x 2048 matrix product in the same dtype; counted are the products of the linear maps
    and of attention with the keys it reads. With --json, one object per length.

    \b
      nsa bench
      nsa bench --lengths 8k,64k --dense-max 8k --repeat 1
      nsa bench kernels --help
    """
    if context.invoked_subcommand:
        return
    from nsa_models import load_tokenizer

    bench.check_lengths(checkpoint.config, lengths, decode_tokens, checkpoint.weights_bytes(), checkpoint.free_memory())
    model, load_s = checkpoint.model, bench.seconds_since_start()
    texts = bench.library_sources() if text is None else [read_text(text)]
    ids = bench.token_ids(load_tokenizer(checkpoint.directory), texts, max(lengths))
    first_chunk_s = bench.first_chunk(model, ids)
    matrix_rate, machine = bench.matrix_rate(model), bench.describe_machine(model)
    branches = bench.computed_branches(model)
    if not as_json:
        click.echo(
            f"{checkpoint.name} on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}\n"
            f"{matrix_rate / 1e9:,.0f} GFLOP/s in {machine['dtype']} matrix products; "
            f"loaded {load_s:.1f} s after the start, first chunk in {first_chunk_s:.2f} s\n"
            f"branches that the gates let through: {', '.join(branches)}\n\n{bench.HEADER}"
        )
    for length in lengths:
        speeds = {}
        for name in ("nsa", "dense") if dense and length <= dense_max else ("nsa",):
            with progress(f"{name} {length:,}", length * repeat) as advance:
                speeds[name] = bench.measure(
                    model,
                    ids[:length],
                    dense=name == "dense",
                    matrix_rate=matrix_rate,
                    decode_tokens=decode_tokens,
                    repeat=repeat,
                    progress=advance,
                )
            if not as_json:
                click.echo(bench.row(length, name, speeds[name]))
        if as_json:
            about = {"matrix_rate": matrix_rate, "branches": branches, "load_s": load_s, "first_chunk_s": first_chunk_s}
            click.echo(json.dumps(bench.record(length, speeds, model=checkpoint.name, machine=machine, **about)))


def read_text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


command.add_command(kernels)
command.add_command(goals)
