"""`nsa`: the group of commands, and the one place where errors become a line on stderr and an exit code."""

import difflib
import importlib
import os
import sys
from pathlib import Path

import click

from nsa_cli.config import read_config
from nsa_cli.output import QUIET, TRACEBACKS, Verbosity, describe, say, verbosity, verbosity_options
from nsa_cli.runlog import RunLog
from nsa_models.errors import NSAError

# Name -> (module with a click command called `command`, one line of help). Modules load when their command runs.
COMMANDS = {
    "ask": ("nsa_cli.commands.ask", "Answer a question about files, folders or piped text."),
    "summarize": ("nsa_cli.commands.summarize", "Summarize files, folders or piped text."),
    "chat": ("nsa_cli.commands.chat", "Talk about files and folders, read once."),
    "batch": ("nsa_cli.commands.batch", "Answer many questions: JSON lines in, JSON lines out."),
    "run": ("nsa_cli.commands.run", "Run a recipe over files, folders or piped text."),
    "recipes": ("nsa_cli.commands.recipes", "List, show, check and begin recipes."),
    "plan": ("nsa_cli.commands.plan", "Show what a question would read: files, tokens, memory, time."),
    "pack": ("nsa_cli.commands.pack", "Write files and folders as one text, without running a model."),
    "models": ("nsa_cli.commands.models", "Install, name, list and check checkpoints."),
    "convert": ("nsa_cli.commands.convert", "Make an NSA checkpoint from a dense one."),
    "train": ("nsa_cli.commands.train", "Train an NSA model, or go on training one."),
    "eval": ("nsa_cli.commands.eval", "Measure how well a model reads: perplexity and tasks, by length."),
    "cache": ("nsa_cli.commands.cache", "List, check and remove stored contexts."),
    "log": ("nsa_cli.commands.log", "Show what was asked and answered before, where a log is kept."),
    "config": ("nsa_cli.commands.config", "Show the settings in force and where they come from."),
    "doctor": ("nsa_cli.commands.doctor", "Check what nsa needs on this machine, with remedies."),
    "completion": ("nsa_cli.commands.completion", "Print the script that completes nsa's commands in a shell."),
    "bench": ("nsa_cli.commands.bench", "Measure prefill and decode speed on this machine."),
}
REPAIRING = ("config", "doctor", "completion")  # run in spite of a mistake in the configuration file
COMPLETION = "_NSA_COMPLETE"  # set by a shell that wants to know what may come next
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as the shell reports them


class LazyGroup(click.Group):
    """Knows its commands by name; imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(COMMANDS[name][0]).command if name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nsa", message="%(prog)s %(version)s")
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    envvar="NSA_LOG",
    show_envvar=True,
    help="Append a JSON line about this run to FILE: arguments, exit code, answers. Default: no log.",
)
@verbosity_options
@click.pass_context
def cli(context: click.Context, log: Path | None) -> None:
    """Ask questions of whole repositories and books, with Native Sparse Attention on this machine.

    \b
      nsa ask src/ "where is the retry policy set?"
      nsa summarize book.txt
      git diff | nsa ask "what does this change?"

    \b
    Exit codes: 0 ok, 1 failure, 2 usage, 3 input missing or unreadable, 4 over budget, 5 model unusable,
    6 check failed, 7 batch partly failed, 130 interrupted, 141 pipe closed.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    elif context.invoked_subcommand not in REPAIRING and "config error" in context.meta:
        raise context.meta["config error"]
    context.meta[RunLog].path = log and log.expanduser()


def main() -> None:
    """The `nsa` program."""
    # Before torch is loaded: a thread of OpenMP's otherwise spins for milliseconds after its work, on a core that
    # another part of the model needs (11 % of a prefill; a decode step beside a busy program took twice as long).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets '?', not an error
    if COMPLETION in os.environ:
        sys.exit(complete())
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # reported by now; the interpreter would try again when it ends, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def complete() -> int:
    """Answer the shell's question what may come next; `nsa completion` prints the script that asks."""
    from click.shell_completion import shell_complete

    return shell_complete(cli, {}, "nsa", COMPLETION, os.environ[COMPLETION])


def run(args: list[str]) -> int:
    """Run one command line; return its exit code."""
    log = RunLog(arguments=list(args))
    code = invoke(args, log)
    log.write(code)
    return code


def invoke(args: list[str], log: RunLog) -> int:
    defaults, problem = {}, {}
    try:
        defaults = read_config(cli).default_map(cli)
    except NSAError as error:
        problem = {"config error": error}
    try:
        with cli.make_context("nsa", list(args), obj=Verbosity(), default_map=defaults) as context:
            context.meta.update(problem | {RunLog: log})
            try:
                cli.invoke(context)
                sys.stdout.flush()
            except (click.exceptions.Exit, click.Abort):
                raise
            except Exception as error:  # while the context still knows the verbosity
                return report(error)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("nsa: interrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        return report(error)
    return 0


def report(error: Exception) -> int:
    """Say what went wrong in one line on stderr; return the exit code."""
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if verbosity() >= TRACEBACKS:
        import traceback

        traceback.print_exception(error)
    context = getattr(error, "ctx", None) if isinstance(error, click.UsageError) else None
    message, code = describe(error)
    hint = f" (see {context.command_path} --help)" if context else ""
    say(f"nsa: {message}{hint}", QUIET, fg="red")
    return code
