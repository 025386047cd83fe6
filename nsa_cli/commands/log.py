"""`nsa log`: what was asked and answered before, where a log is kept."""

import json
import shlex
from datetime import datetime

import click

from nsa_cli.output import verbosity_options
from nsa_cli.runlog import RunLog, matches, read_log
from nsa_models.errors import InputError


@click.command("log")
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("--last", "-n", type=click.IntRange(1), default=20, show_default=True, help="Most runs to show.")
@click.option("--failed", is_flag=True, help="Only runs whose exit code is not 0.")
@click.option("--json", "as_json", is_flag=True, help="The log's own lines: one JSON object a run, whole.")
@verbosity_options
@click.pass_context
def command(context: click.Context, words, last, failed, as_json) -> None:
    """Show the last runs, those with every WORD in their arguments or answers, the newest last.

    There is a log only where one was asked for: `nsa --log FILE ...`, NSA_LOG, or `log = "~/nsa.jsonl"` in the
    settings file. It is yours alone to read, and `nsa log` is not in it.

    \b
      nsa log
      nsa log heron owner --last 3
      nsa log --failed
      nsa log heron --json | jq -r '.answers[].answer'
    """
    log: RunLog = context.find_root().meta[RunLog]
    path, log.path = log.path, None
    if path is None:
        raise InputError("no log is kept; name its file: nsa --log FILE, NSA_LOG, or log in the settings file")
    runs = [run for run in read_log(path) if matches(run, words) and (run["exit_code"] or not failed)]
    for run in runs[-last:]:
        click.echo(json.dumps(run, ensure_ascii=False) if as_json else to_text(run))


def to_text(run: dict) -> str:
    """When, what and, below it, the answers' first lines."""
    when = datetime.fromisoformat(run["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    code = f"  exit code {run['exit_code']}" if run["exit_code"] else ""
    answers = ["  " + first_line(answer["answer"]) for answer in run["answers"]]
    return "\n".join([f"{when}  {shlex.join(['nsa', *run['arguments']])}{code}", *answers])


def first_line(text: str) -> str:
    line, _, rest = text.strip().partition("\n")
    return line + (" ..." if rest else "")
