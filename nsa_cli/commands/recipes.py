"""`nsa recipes`: list, show, check and begin recipes."""

import json
import os
import re
from pathlib import Path

import click

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.options import checkpoint_options, json_option
from nsa_cli.commands.run import describe, problems_of
from nsa_cli.completion import complete_recipes
from nsa_cli.output import VERBOSE, say, verbosity_options, write_atomically
from nsa_cli.recipe import builtin_dir, find_recipe, load_recipe, recipe_paths, user_dir
from nsa_cli.recipe_keys import NAME, json_schema
from nsa_cli.reply import SCHEMA_VERSION
from nsa_models.errors import CheckError, InputError

TEMPLATE = """\
# yaml-language-server: $schema={schema}
# A recipe for `nsa run {name}`. Check it with: nsa recipes validate {name}
name: {name}
description: Say in one line what it does.
# Parameters are options of the command. {{{{ focus }}}} below stands for this one's value.
params:
  focus:
    type: string # string, int, float, bool or choice (with choices: [...])
    default: everything
    help: What to look at.
# Which files of a folder are read, as in .gitignore.
sources:
  exclude: [tests]
# How long an answer may be. Temperature 0 gives the same answer every time.
generate:
  max_tokens: 200
  temperature: 0
# What is asked. `over` says about what: document (all at once), file, chapter or shard (as much as fits at a time).
steps:
  - id: notes
    over: shard
    prompt: "List the main points about {{{{ focus }}}} in the text above."
  # Reads what `notes` answered about every shard.
  - id: report
    from: [notes]
    prompt: "Write one paragraph about {{{{ focus }}}} from the notes above."
# What must be true of the answer; else the exit code is 6.
expect:
  min_words: 5
# What to try it on, with `nsa recipes test {name}`, and what must be true of that answer besides.
examples:
  - text: The harbour was closed on 3 May, because the keeper, Ada Brill, fell ill.
    params:
      focus: people
    expect:
      max_words: 200
"""


@click.group("recipes", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List, show, check and begin recipes. Your own shadow built-in ones of the same name.

    \b
    Examples:
      nsa recipes ls
      nsa recipes show code-review
      nsa recipes new my-review --from code-review
      nsa recipes edit my-review
      nsa recipes validate my-review
      nsa recipes test my-review
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command("ls", short_help="List recipes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(as_json: bool) -> None:
    """List all recipes; yours are marked with a star.

    \b
      nsa recipes ls
    """
    found = recipe_paths()
    width = max(map(len, found), default=0)
    for name, path in found.items():
        own = path.parent != builtin_dir()
        if as_json:
            row = {"name": name, "description": describe(name), "path": str(path), "builtin": not own}
            click.echo(json.dumps(row, ensure_ascii=False))
        else:
            click.echo(f"{'*' if own else ' '} {name:{width}}  {describe(name)}")


@command.command(short_help="Print a recipe.")
@click.argument("name", metavar="RECIPE", shell_complete=complete_recipes)
def show(name: str) -> None:
    """Print RECIPE's file, comments and all.

    \b
      nsa recipes show code-review
    """
    click.echo(find_recipe(name).read_text("utf-8"), nl=False)


@command.command(short_help="Check recipes.")
@click.argument("names", metavar="RECIPE...", nargs=-1, shell_complete=complete_recipes)
def validate(names: tuple[str, ...]) -> None:
    """Check recipes by name or file, by default all of your own; every problem with its line. Exit code 6 if any.

    \b
      nsa recipes validate my-review other.yaml
    """
    paths = [find_recipe(name) for name in names] or sorted(user_dir().glob("*.yaml"))
    wrong = 0
    for path in paths:
        problems = all_problems(path)
        wrong += bool(problems)
        for line in problems or [f"{path}: ok"]:
            click.echo(line)
    if wrong:
        raise CheckError(f"{wrong} of {len(paths)} recipes cannot be used")


def all_problems(path: Path) -> list[str]:
    """With their lines, also where the file is no YAML."""
    try:
        return problems_of(path)
    except InputError as error:
        return [str(error)]


@command.command(short_help="Begin a recipe of your own.")
@click.argument("name")
@click.option(
    "--from", "source", metavar="RECIPE", shell_complete=complete_recipes, help="Start from a copy of this one."
)
def new(name: str, source: str | None) -> None:
    """Write a commented recipe called NAME into your folder, to be edited.

    \b
      nsa recipes new my-review --from code-review
    """
    if not re.fullmatch(NAME, name):
        raise click.UsageError(f"{name!r} is not a name for a recipe; write it like my-review")
    text = TEMPLATE.format(name=name, schema=(builtin_dir() / "recipe.schema.json").as_posix())
    if source:
        original = find_recipe(source).read_text("utf-8")
        text = re.sub(r"^name:.*$", f"name: {name}", original, count=1, flags=re.MULTILINE)
    target = user_dir() / f"{name}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{target} is there already; edit it, or choose another name") from None
    click.echo(target)


@command.command(short_help="Try a recipe on its examples.")
@click.argument("name", metavar="RECIPE", shell_complete=complete_recipes)
@checkpoint_options
@json_option
@verbosity_options
def test(name: str, checkpoint: Checkpoint, as_json: bool) -> None:
    """Run RECIPE on each of the `examples` in its file, and check what it and they expect. Exit code 6 if an answer
    falls short.

    \b
      nsa recipes test my-review
      nsa recipes test my-review -m qwen-nsa/ --json | jq -c .failed
    """
    from nsa_cli.examples import try_examples

    recipe = load_recipe(name)
    if not recipe.examples:
        raise InputError(f"{recipe.path} has no examples; nsa recipes new shows how they are written")
    wrong = 0
    for number, tried in enumerate(try_examples(checkpoint, recipe), 1):
        wrong += bool(tried.failed)
        if as_json:
            row = {"example": number, "failed": tried.failed, "answer": tried.reply and tried.reply.text}
            click.echo(json.dumps({"schema_version": SCHEMA_VERSION} | row, ensure_ascii=False))
        else:
            click.echo(f"{number}: {'; '.join(tried.failed) or 'ok'}")
            say(tried.reply.text if tried.reply else "(no answer)", VERBOSE)
    if wrong:
        raise CheckError(f"recipe {recipe.name}: {wrong} of {len(recipe.examples)} examples failed")


@command.command(short_help="Edit a recipe of your own.")
@click.argument("name", metavar="RECIPE", shell_complete=complete_recipes)
def edit(name: str) -> None:
    """Open RECIPE in $EDITOR and check what was written. A built-in one is copied into your folder first, where it
    takes the built-in one's place.

    \b
      nsa recipes edit my-review
      EDITOR=nano nsa recipes edit code-review
    """
    original = find_recipe(name)
    text = original.read_text("utf-8")
    edited = click.edit(text, extension=".yaml")
    if edited is None or edited == text:
        say("nsa: nothing was changed")
        return
    target = user_dir() / original.name if original.parent == builtin_dir() else original
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, edited.encode())
    click.echo(target)
    problems = all_problems(target)
    for line in problems:
        click.echo(line, err=True)
    if problems:
        raise CheckError(f"{name} cannot be used as it is; mend it: nsa recipes edit {name}")


@command.command(short_help="Print the JSON schema of recipes.")
def schema() -> None:
    """Print the JSON schema of recipes, for editors; it lies beside the built-in ones.

    \b
      nsa recipes schema > recipe.schema.json
    """
    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@command.command(short_help="Print where recipes are.")
@click.argument("name", metavar="[RECIPE]", required=False, shell_complete=complete_recipes)
def path(name: str | None) -> None:
    """Print the folder of your recipes, or where RECIPE is.

    \b
      cd "$(nsa recipes path)"
      $EDITOR "$(nsa recipes path my-review)"
    """
    click.echo(os.fspath(Path(find_recipe(name)) if name else user_dir()))
