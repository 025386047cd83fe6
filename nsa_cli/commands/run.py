"""`nsa run`: a recipe over documents. Its parameters are options of the command that is made for it."""

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from nsa_cli.commands.options import (
    output_option,
    paths_or_stdin,
    question_options,
    verbosity_options,
)
from nsa_cli.completion import complete_paths, complete_recipes
from nsa_cli.output import emit, say_skipped, silent
from nsa_cli.recipe import Param, Recipe, load_recipe, read_recipe, recipe_paths
from nsa_cli.reply import show
from nsa_models.errors import InputError

TYPES = {"string": click.STRING, "int": click.INT, "float": click.FLOAT}
PREFIX = "recipe_"  # of a parameter's name in Python, where those of the other options are taken


class RecipeGroup(click.Group):
    """A command for every recipe, made when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(recipe_paths())

    def get_command(self, context: click.Context, name: str) -> click.Command:
        return recipe_command(load_recipe(name))

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names alone: a recipe that cannot be used is still a name."""
        return complete_recipes(context, None, incomplete)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Recipes"):
            formatter.write_dl([(name, describe(name)) for name in self.list_commands(context)])


@click.group("run", cls=RecipeGroup, subcommand_metavar="RECIPE PATH... [OPTIONS]", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Run RECIPE, by name or as a .yaml file, over the files and folders at PATH or text piped in.

    A recipe's parameters are options: `nsa run NAME --help` shows them. The exit code is 6 if the answer is not what
    the recipe expects.

    \b
      nsa run explain-repo .
      nsa run code-review src/ --focus "error handling"
      nsa run changelog --log 30 --version 1.2.0
      nsa run ./my-recipe.yaml notes/ --json
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def describe(name: str) -> str:
    """A recipe's line in a list."""
    try:
        return load_recipe(name).description
    except InputError as error:
        return f"unusable: {error}"


def recipe_command(recipe: Recipe) -> click.Command:
    """The command that runs this recipe. Raises InputError if a parameter is called like an option of every command."""

    @question_options
    @output_option
    @verbosity_options
    def run(paths, read, packing, request, checkpoint, as_json, **given) -> None:
        from nsa_cli.documents import read_documents
        from nsa_cli.steps import pack_for, run_recipe

        bound = recipe.bind({name.removeprefix(PREFIX): value for name, value in given.items()})
        documents, skips = read_documents(paths_or_stdin(paths, read), bound.read_options(read))
        say_skipped(skips)
        typed = explicit()
        context = pack_for(bound, documents, skips, checkpoint, request, packing, typed)
        reply = run_recipe(checkpoint, bound, context, request, silent if as_json else emit, typed)
        show(reply, as_json)
        reply.require()

    made = click.command(recipe.name, help=help_text(recipe))(run)
    taken = {name for parameter in made.params for name in (*parameter.opts, *parameter.secondary_opts)}
    set_defaults(made, recipe)
    options = [option(param) for param in recipe.params]
    for param, made_option in zip(recipe.params, options, strict=True):
        if taken & {*made_option.opts, *made_option.secondary_opts}:
            raise InputError(f"{recipe.path}: parameter {param.name} is an option of nsa run already; rename it")
    made.params = [
        click.Argument(["paths"], nargs=-1, metavar="PATH...", shell_complete=complete_paths),
        *options,
        *made.params,
    ]
    return made


def option(param: Param) -> click.Option:
    """The command-line option of a parameter."""
    name, flag = PREFIX + param.name, "--" + param.name.replace("_", "-")
    settings = dict(help=param.help, required=param.default is None, default=param.default)
    if settings["required"]:
        del settings["default"]
    if param.type == "bool":
        return click.Option([name, f"{flag}/--no-{flag[2:]}"], **settings)
    kind = click.Choice(param.choices) if param.type == "choice" else TYPES[param.type]
    return click.Option([name, flag], type=kind, show_default=param.default not in (None, ""), **settings)


def set_defaults(made: click.Command, recipe: Recipe) -> None:
    """Let --help show what the recipe decides for its answer, the last step's."""
    decided = {**recipe.generate, **recipe.steps[-1].generate}
    decided |= {name: getattr(recipe, name) for name in ("max_context", "evidence", "reread")}
    decided |= {name: recipe.packing.get(name) for name in ("order", "overflow")}
    for parameter in made.params:
        value = decided.get(parameter.name)
        if value is not None and parameter.name != "stop":
            parameter.default = str(value) if parameter.name == "max_context" else value


def explicit() -> set[str]:
    """Names of the options that were typed: they outrank the recipe, which outranks the environment."""
    context = click.get_current_context()
    names = (parameter.name for parameter in context.command.params)
    typed = {name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    return typed | ({"system"} if "system_file" in typed else set())


def help_text(recipe: Recipe) -> str:
    example = " ".join(
        f"--{param.name.replace('_', '-')} {param.choices[0] if param.choices else param.type.upper()}"
        for param in recipe.params
        if param.default is None
    )
    return f"{recipe.description}\n\n\b\n  nsa run {recipe.name} PATH {example}".rstrip()


def problems_of(path) -> list[str]:
    """All that is wrong with a recipe file, the names of its parameters among it."""
    recipe, problems = read_recipe(path)
    if recipe and not problems:
        try:
            recipe_command(recipe)
        except InputError as error:
            return [str(error)]
    return problems
