"""`nsa config`: the settings in force, and where they come from."""

import json

import click

from nsa_cli.config import config_path, settings
from nsa_cli.output import verbosity_options


@click.group("config", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Show the settings in force and where they come from.

    Options that show an environment variable in their help can be set for good in a TOML file: a line such as
    `max-tokens = 300` is for every command that has the option, one below `[summarize]` for that command. The command
    line goes before the environment, the environment before the file. No other file is read: what you ask about
    cannot set anything.

    \b
      nsa config show --origin
      echo 'max-tokens = 300' >> "$(nsa config path)"
      NSA_MAX_TOKENS=50 nsa config show --origin
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command()
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per setting.")
@verbosity_options
@click.pass_context
def show(context: click.Context, origin: bool, as_json: bool) -> None:
    """List every setting, as lines for the configuration file; what is not set is commented out.

    \b
      nsa config show
      nsa config show --origin
    """
    for key, value, source in settings(context.find_root().command):
        if as_json:
            click.echo(json.dumps({"schema_version": 1, "key": key, "value": value, "origin": source}))
            continue
        line = f"# {key} =" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
        click.echo(f"{line}  # {source}" if origin else line)


@command.command()
def path() -> None:
    """Print the path of the configuration file, and make its folder.

    \b
      nsa config path
      $EDITOR "$(nsa config path)"
    """
    config_path().parent.mkdir(parents=True, exist_ok=True)
    click.echo(config_path())
