"""REFERENCE.md: every command's help, from the commands themselves. `python -m nsa_cli.reference > REFERENCE.md`."""

import os
from collections.abc import Iterator

import click

from nsa_cli.commands.run import RecipeGroup

WIDTH = 100
INTRODUCTION = """# Reference

Every command and option, as `--help` prints them. This page is generated: `make reference`.
"""


def commands(command: click.Command, context: click.Context) -> Iterator[click.Context]:
    """A context for the command and all below it, in the order in which they are listed."""
    yield context
    if isinstance(command, click.Group) and not isinstance(command, RecipeGroup):  # recipes say the same but for params
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            yield from commands(below, type(below).context_class(below, info_name=name, parent=context))


def page(root: click.Group) -> str:
    start = click.Context(root, info_name="nsa", max_content_width=WIDTH, terminal_width=WIDTH, **root.context_settings)
    found = list(commands(root, start))
    contents = "\n".join(f"- [`{c.command_path}`](#{c.command_path.replace(' ', '-')})" for c in found)
    helps = (f"## {c.command_path}\n\n```text\n{c.command.get_help(c)}\n```\n" for c in found)
    return "\n".join([INTRODUCTION, contents + "\n", *helps])


if __name__ == "__main__":
    from nsa_cli.cli import cli

    os.environ["NSA_CONFIG_DIR"] = os.devnull  # a page without the recipes of whoever makes it
    print(page(cli), end="")
