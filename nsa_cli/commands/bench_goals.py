"""`nsa bench goals`: the table of what was measured on a GPU, beside what is to be reached."""

import json

import click

from nsa_cli.commands.options import verbosity_options
from nsa_cli.kernel_goals import table
from nsa_models.errors import InputError


@click.command("goals")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@verbosity_options
def command(files) -> None:
    """Print the table of BENCHMARKS.md from records of `nsa bench kernels` and `nsa bench --json` in FILES.

    What no record says is "not measured". Of two records of a case the later counts; failures stand below the table.

    \b
      nsa bench goals
      nsa bench goals gpu/*.jsonl
    """
    click.echo(table(record for file in files for record in read(file)))


def read(path: str) -> list[dict]:
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not ("case" in record or "tokens" in record):
                raise InputError(f"{path}:{number} is no record of nsa bench; give files of --json or of bench kernels")
            found.append(record)
    return found
