"""`nsa completion`: the script that lets a shell complete commands, options and names."""

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete nsa's commands, options, models and stored contexts.

    \b
      nsa completion bash > ~/.local/share/bash-completion/completions/nsa
      nsa completion zsh > "${fpath[1]}/_nsa"
      nsa completion fish > ~/.config/fish/completions/nsa.fish
    """
    from click.shell_completion import get_completion_class

    from nsa_cli.cli import COMPLETION

    click.echo(get_completion_class(shell)(context.find_root().command, {}, "nsa", COMPLETION).source())
