"""A recipe tried on its own examples: what it expects, and what each of them does, of the model's answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsa_cli.batch import TEXT
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.checks import failed_checks
from nsa_cli.documents import Document, ReadOptions, read_documents
from nsa_cli.packing import Packing
from nsa_cli.recipe import Example, Recipe
from nsa_cli.request import Request
from nsa_cli.steps import RecipeAnswer, pack_for, run_recipe
from nsa_models.errors import CheckError

if TYPE_CHECKING:
    from nsa_cli.context import Context


@dataclass(frozen=True)
class Tried:
    """An example's answer, None where it is not of its schema, and what is wrong with it."""

    example: Example
    reply: RecipeAnswer | None
    failed: tuple[str, ...]


def try_examples(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[Tried]:
    """Every example, one after the other. Raises InputError where its paths cannot be read."""
    for example in recipe.examples:
        bound = recipe.bind(example.params)
        try:
            reply = run_recipe(checkpoint, bound, _context(checkpoint, recipe, bound, example), Request())
        except CheckError as error:
            yield Tried(example, None, (str(error),))
        else:
            yield Tried(example, reply, (*reply.failed, *failed_checks(example.expect, reply)))


def _context(checkpoint: Checkpoint, recipe: Recipe, bound: Recipe, example: Example) -> "Context":
    documents, skips = [Document(TEXT, example.text or "")], []
    if example.paths:
        paths = [str(recipe.path.parent / path) for path in example.paths]
        documents, skips = read_documents(paths, bound.read_options(ReadOptions()))
    return pack_for(bound, documents, skips, checkpoint, Request(), Packing())
