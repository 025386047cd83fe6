"""Help, of every command: examples, -h, the generated page; and what Ctrl-C and a closed pipe end with."""

import re
from pathlib import Path

import click
import pytest

from nsa_cli import reference
from nsa_cli.cli import cli

ROOT = Path(__file__).parents[2]
CONTEXTS = list(reference.commands(cli, click.Context(cli, info_name="nsa", **cli.context_settings)))
LEAVES = [context for context in CONTEXTS if not isinstance(context.command, click.Group)]


def path(context: click.Context) -> str:
    return context.command_path


def test_the_reference_is_what_the_commands_say():
    written = (ROOT / "REFERENCE.md").read_text("utf-8")
    assert written == reference.page(cli), "run: make reference"


def test_the_reference_has_every_command_and_option():
    page = reference.page(cli)
    for context in CONTEXTS:
        assert f"\n## {context.command_path}\n" in page
        for option in context.command.params:
            assert all(name in page for name in option.opts if name.startswith("-"))
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("context", CONTEXTS, ids=path)
def test_every_help_shows_an_example(context):
    before_options = context.command.get_help(context).partition("\nOptions:")[0].partition("\n")[2]
    assert re.search(rf"^ {{4}}(.*[|(\s])?{context.command_path}\b", before_options, re.M)


@pytest.mark.parametrize("context", CONTEXTS, ids=path)
def test_h_is_help_everywhere(nsa, context):
    args = context.command_path.split()[1:]
    short, long = nsa(*args, "-h"), nsa(*args, "--help")
    assert short == long and short.code == 0 and "Usage: nsa" in short.out


@pytest.mark.parametrize("context", LEAVES, ids=path)
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_interrupted_is_130_and_a_closed_pipe_141_in_every_command(nsa, monkeypatch, context, error, code):
    def ends(*args, **kwargs):
        raise error

    monkeypatch.setattr(context.command, "callback", ends)
    required = [p for p in context.command.params if p.required and isinstance(p, click.Argument)]
    values = [p.type.choices[0] if isinstance(p.type, click.Choice) else "value" for p in required]
    assert nsa(*context.command_path.split()[1:], *values).code == code
