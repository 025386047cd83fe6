"""`nsa convert`: a dense checkpoint becomes an NSA checkpoint."""

from pathlib import Path

import click


@click.command("convert")
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--context", type=click.IntRange(1), default=131072, show_default=True, help="Tokens that the NSA model shall read."
)
@click.option(
    "--chunk",
    type=click.IntRange(1),
    help="In contexts longer than the dense model's, positions come in chunks of this many tokens: distances are true "
    "within a chunk and to the one before it, and whatever is further away stands between one and two chunks away.  "
    "[default: a quarter of the dense model's context]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    default="bfloat16",
    show_default=True,
    help="Stored as.",
)
@click.option(
    "--compress-block", type=click.IntRange(1), default=32, show_default=True, help="Tokens per compressed key (l)."
)
@click.option(
    "--compress-stride",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens from one compressed key to the next (d).",
)
@click.option(
    "--compress-kind",
    type=click.Choice(["mean", "linear", "softmax"]),
    default="mean",
    show_default=True,
    help="How a block becomes one key: its mean, a linear map of it, or a mean with softmax weights and a linear map "
    "after it. The learned kinds start as the mean, for training to change.",
)
@click.option(
    "--compress-rope",
    type=click.Choice(["before", "after", "none"]),
    default="before",
    show_default=True,
    help="When compressed keys are rotated: before or after compression, or not at all.",
)
@click.option(
    "--select-block", type=click.IntRange(1), default=64, show_default=True, help="Tokens per selected block (l')."
)
@click.option(
    "--select-count",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Blocks a query reads, forced ones included (n).",
)
@click.option(
    "--local-blocks",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Blocks read in any case: the token's own and those right before it.",
)
@click.option(
    "--window", type=click.IntRange(0), default=512, show_default=True, help="Tokens of the sliding window (w)."
)
def command(dense: Path, out: Path, context: int, dtype: str, **variant: int | str | None) -> None:
    """Convert DENSE, a llama or qwen2 checkpoint (a directory with safetensors, or a .gguf file), to OUT.

    The result answers as the dense model does for contexts of up to select-count * select-block tokens; beyond them
    it reads the blocks that matter to each token. Train it to make the other branches useful.

    \b
    Examples:
      nsa convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2-nsa/
      nsa convert Qwen2.5-0.5B-Instruct/ qwen-nsa/ --context 65536 --dtype int8
      nsa convert Qwen2.5-0.5B-Instruct/ qwen-nsa/ --dtype float32 --compress-kind softmax --compress-rope after
    """
    from nsa_models.convert import convert

    config = convert(dense, out, context, dtype, **variant)
    exact = config.select_count * config.select_block
    click.echo(f"{out}: {config.max_position_embeddings:,} tokens of context, dense up to {exact:,}", err=True)
