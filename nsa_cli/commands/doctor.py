"""`nsa doctor`: what nsa needs on this machine, and what to do where it is missing."""

import json
from dataclasses import asdict

import click

from nsa_cli.commands.options import json_option, model_option
from nsa_cli.doctor import BROKEN, examine
from nsa_cli.output import verbosity_options
from nsa_models.errors import NSAError


@click.command("doctor")
@model_option("Model to look for.")
@json_option
@verbosity_options
@click.pass_context
def command(context: click.Context, model, as_json) -> None:
    """Check what nsa needs on this machine: Python, torch, compiler, CPU, GPU, models, settings, memory and disk.

    A line a check: `ok`, `slow` (it works, but something would make it faster or better) or `broken`, with what to do.
    Exit code 1 if something is broken.

    \b
      nsa doctor
      nsa doctor -m my-checkpoint/
      nsa doctor --json | jq -r 'select(.state != "ok") | .remedy'
    """
    findings = examine(context.find_root().command, model)
    for finding in findings:
        click.echo(json.dumps({"schema_version": 1} | asdict(finding)) if as_json else str(finding))
    broken = [finding.name for finding in findings if finding.state == BROKEN]
    if broken:
        raise NSAError(f"broken: {', '.join(broken)}")
