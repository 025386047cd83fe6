"""A question and its options as a recipe of the user's own."""

from collections.abc import Collection
from pathlib import Path

from nsa_cli.documents import ReadOptions
from nsa_cli.output import write_atomically
from nsa_cli.packing import Packing
from nsa_cli.recipe import read_recipe, user_dir
from nsa_cli.request import Request
from nsa_models.errors import InputError
from nsa_models.sampling import Sampling


def save_recipe(
    name: str, question: str, request: Request, read: ReadOptions, packing: Packing, typed: Collection[str]
) -> Path:
    """Write recipe `name` that asks `question` as these options say, those that were typed; returns where it is.

    Raises InputError if there is one of that name in the user's folder, or the question cannot stand in a recipe.
    """
    import yaml

    path = user_dir() / f"{name}.yaml"
    if path.exists():
        raise InputError(f"{path} is there already; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = recipe(name, question, request, read, packing, typed)
    write_atomically(path, yaml.safe_dump(saved, sort_keys=False).encode())
    _, problems = read_recipe(path)
    if problems:
        path.unlink()
        raise InputError(f"this is no recipe: {problems[0].removeprefix(f'{path}:')}")
    return path


def recipe(
    name: str, question: str, request: Request, read: ReadOptions, packing: Packing, typed: Collection[str]
) -> dict:
    """The recipe's keys and values; only those that say something."""
    generate = {key: getattr(request.sampling, key) for key in Sampling.__dataclass_fields__ if key in typed}
    whole = {
        "name": name,
        "description": " ".join(question.split())[:80],
        "sources": {"include": list(read.include), "exclude": list(read.exclude)},
        "context": {key: getattr(request, key) for key in ("max_context", "evidence") if key in typed}
        | {key: getattr(packing, key) for key in ("order", "overflow") if key in typed}
        | {"prefer": list(packing.prefer), "levels": [f"{pattern}={level}" for pattern, level in packing.levels]},
        "system": request.system,
        "generate": generate | {"stop": list(request.stop)},
        "steps": [{"id": "answer", "prompt": question, "schema": request.schema and request.schema.json}],
    }
    return _filled(whole)


def _filled(value):
    """Without keys that have nothing to say."""
    if isinstance(value, dict):
        found = {key: _filled(item) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not None and item != {} and item != []}
    return [_filled(item) for item in value] if isinstance(value, list) else value
