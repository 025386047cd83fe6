"""What a shell is offered: installed models, stored contexts, files."""

import click
from click.shell_completion import CompletionItem

from nsa_cli.settings import cache_dir, models_dir


def complete_paths(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Installed models; directories where none begins so, since a checkpoint may be anywhere."""
    names = sorted(path.parent.name for path in models_dir().glob("*/config.json"))
    found = [CompletionItem(name) for name in names if name.startswith(incomplete) and not name.startswith(".")]
    return found or [CompletionItem(incomplete, type="dir")]


def complete_stored(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The ids of stored contexts, with what tells them apart."""
    from nsa_cli.store import Store

    entries = (entry for entry in Store(cache_dir()).entries() if entry.id.startswith(incomplete))
    return [CompletionItem(entry.id[:12], help=f"{entry.tokens:,} tokens, {entry.model}") for entry in entries]


def complete_recipes(context: click.Context, parameter: object, incomplete: str) -> list[CompletionItem]:
    """Recipes by name; files where none begins so."""
    from nsa_cli.recipe import recipe_paths

    found = [CompletionItem(name) for name in recipe_paths() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]
