"""A recipe: what to read and what to ask, as a YAML file. Found by name or path, checked whole, bound to parameters.

Text of a document never gets near a template: parameters are put into the recipe's own strings, in one pass, before
anything is read. A recipe is taken from the user's folder, from the built-in ones or from a path that was typed, never
from what is being read.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nsa_cli import recipe_keys, safe_yaml
from nsa_cli.documents import ReadOptions
from nsa_cli.packing import Packing, reads_in_parts
from nsa_cli.recipe_keys import NAME, Problem, Values, suggest
from nsa_cli.settings import config_dir
from nsa_models.errors import InputError

SUFFIXES = (".yaml", ".yml")
PLACEHOLDER = re.compile(r"\{\{\s*(" + NAME + r")\s*\}\}")
PYTHON_TYPES = {"string": str, "choice": str, "int": int, "float": (int, float), "bool": bool}
EMPTY = {"string": "", "bool": False}  # the default of an optional parameter that states none


@dataclass(frozen=True)
class Param:
    """A parameter. default: None = it must be given."""

    name: str
    type: str  # recipe_keys.TYPES
    help: str
    default: str | int | float | bool | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One prompt, asked about every part of what it reads. generate: fields of Sampling, and stop.

    What it says itself comes before what the recipe says for all steps.
    """

    id: str
    prompt: str
    over: str = "document"  # recipe_keys.PARTS
    inputs: tuple[str, ...] = ()  # earlier steps whose answers it reads; () = the sources
    system: str | None = None
    generate: Mapping[str, object] = field(default_factory=dict)
    schema: str | dict | None = None  # JSON schema, or its short form


@dataclass(frozen=True)
class Example:
    """What to try a recipe on, either a text or paths, and what is expected of that answer besides `Recipe.expect`."""

    text: str | None = None
    paths: tuple[str, ...] = ()
    params: Mapping[str, object] = field(default_factory=dict)
    expect: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What the file says. Placeholders stand in its texts until `bind` fills them in."""

    name: str
    description: str
    path: Path
    steps: tuple[Step, ...]
    params: tuple[Param, ...] = ()
    system: str | None = None
    generate: Mapping[str, object] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    match: tuple[str, ...] = ()  # regular expressions of the lines to read; () = all
    around: int = 0
    max_context: int | None = None
    evidence: int | None = None
    reread: int | None = None
    packing: Mapping[str, object] = field(default_factory=dict)  # fields of Packing
    expect: Mapping[str, object] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()

    def bind(self, given: Mapping[str, object]) -> "Recipe":
        """This recipe with its parameters filled in: those given, else their defaults.

        Raises InputError for an unknown or missing parameter, and for a value that is not of its type.
        """
        values = self.values(given)

        def fill(text: str | None) -> str | None:
            return text and PLACEHOLDER.sub(lambda found: _text(values[found[1]]), text)

        def fill_all(texts) -> tuple[str, ...]:
            return tuple(fill(text) for text in texts)

        expect = dict(self.expect)
        for key in ("contains", "excludes"):
            if key in expect:
                expect[key] = fill_all(expect[key])
        return replace(
            self,
            params=(),
            system=fill(self.system),
            include=fill_all(self.include),
            exclude=fill_all(self.exclude),
            match=tuple(PLACEHOLDER.sub(lambda m: re.escape(_text(values[m[1]])), text) for text in self.match),
            steps=tuple(replace(s, prompt=fill(s.prompt), system=fill(s.system)) for s in self.steps),
            expect=expect,
        )

    def read_options(self, read: ReadOptions) -> ReadOptions:
        """`read`, with the recipe's patterns; --include of the command line replaces the recipe's."""
        return replace(read, include=read.include or self.include, exclude=self.exclude + read.exclude)

    def packed(self, packing: Packing, explicit: Collection[str]) -> Packing:
        """`packing`, with what the recipe says of it, except for the fields that are named in `explicit`."""
        own = {name: value for name, value in self.packing.items() if name not in explicit}
        return reads_in_parts(replace(packing, **own))

    def values(self, given: Mapping[str, object]) -> dict[str, object]:
        """Every parameter's value. Raises InputError as `bind` does."""
        known = {param.name: param for param in self.params}
        for name in given:
            if name not in known:
                hint = suggest(name, tuple(known)) if known else "it takes none"
                raise InputError(f"recipe {self.name} has no parameter {name!r}; {hint}")
        values = {param.name: given.get(param.name, param.default) for param in self.params}
        for name, value in values.items():
            wrong = mismatch(known[name], value)
            if wrong:
                raise InputError(f"recipe {self.name}: parameter {name} {wrong}")
        return values


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def mismatch(param: Param, value: object) -> str:
    """Why `value` cannot be the parameter's, or an empty string."""
    if value is None:
        return "is required"
    wanted = PYTHON_TYPES[param.type]
    if not isinstance(value, wanted) or (isinstance(value, bool) and param.type != "bool"):
        return f"must be of type {param.type}, not {value!r}"
    if param.type == "choice" and value not in param.choices:
        return f"is {value!r}; {suggest(value, param.choices)}"
    return ""


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of a file, or of that name in the user's folder or among the built-in ones.

    Only what looks like a path is one: a name never means a file of the working directory. Raises InputError.
    """
    path = find_recipe(str(name_or_path))
    recipe, problems = read_recipe(path)
    if problems:
        more = f"; {len(problems) - 1} more: nsa recipes validate {path}" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    return recipe


def find_recipe(name: str) -> Path:
    """Where the recipe of that name or path is. Raises InputError."""
    if "/" in name or name.endswith(SUFFIXES):
        if not Path(name).is_file():
            raise InputError(f"no recipe file {name}")
        return Path(name)
    known = recipe_paths()
    if name not in known:
        raise InputError(f"no recipe {name!r}; {suggest(name, tuple(known))}")
    return known[name]


def recipe_paths() -> dict[str, Path]:
    """Every recipe by name; the user's own come before built-in ones of the same name."""
    found = {path.stem: path for folder in (builtin_dir(), user_dir()) for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(found.items()))


def user_dir() -> Path:
    return config_dir() / "recipes"


def builtin_dir() -> Path:
    import nsa_recipes

    return Path(nsa_recipes.__file__).parent


def read_recipe(path: Path) -> tuple[Recipe | None, list[str]]:
    """The recipe in a file and all that is wrong with it, as `file:line: what`. None if too much is."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    problems: list[tuple[int, str]] = []

    def problem(line: int, what: str) -> None:
        problems.append((line, what))

    values = recipe_keys.RECIPE.read(safe_yaml.parse(data, str(path)), "", problem)
    recipe = None
    if not problems:
        recipe = _recipe(values, path)
        _check(recipe, values, problem)
    return recipe, [f"{path}:{line}: {what}" for line, what in sorted(problems)]


def _recipe(values: Values, path: Path) -> Recipe:
    sources, context = (values.get(name) or Values() for name in ("sources", "context"))
    return Recipe(
        name=values.get("name"),
        description=values.get("description"),
        path=path,
        steps=tuple(_step(step) for step in values.get("steps")),
        params=tuple(_param(name, param) for name, param in values.get("params", {}).items()),
        system=values.get("system"),
        generate=(values.get("generate") or Values()).values,
        include=tuple(sources.get("include", ())),
        exclude=tuple(sources.get("exclude", ())),
        match=tuple(sources.get("match", ())),
        around=sources.get("around", 0),
        max_context=context.get("max_context"),
        evidence=context.get("evidence"),
        reread=context.get("reread"),
        packing=_packing(context),
        expect=_plain(values.get("expect") or Values()),
        examples=tuple(_example(example) for example in values.get("examples", ())),
    )


def _packing(context: Values) -> dict[str, object]:
    own = {name: context.get(name) for name in ("order", "overflow") if name in context.lines}
    levels = tuple(tuple(text.rpartition("=")[::2]) for text in context.get("levels", ()))
    prefer = {"prefer": tuple(context.get("prefer"))} if "prefer" in context.lines else {}
    return own | prefer | ({"levels": levels} if levels else {})


def _example(example: Values) -> Example:
    expect = _plain(example.get("expect") or Values())
    return Example(example.get("text"), tuple(example.get("paths", ())), example.get("params", {}), expect)


def _step(step: Values) -> Step:
    return Step(
        id=step.get("id"),
        prompt=step.get("prompt").strip(),
        over=step.get("over", "document"),
        inputs=tuple(step.get("from", ())),
        system=step.get("system"),
        generate=(step.get("generate") or Values()).values,
        schema=step.get("schema"),
    )


def _param(name: str, param: Values) -> Param:
    kind = param.get("type")
    default = param.get("default", None if param.get("required") else EMPTY.get(kind))
    return Param(name, kind, param.get("help"), default, tuple(param.get("choices", ())))


def _plain(values: Values) -> dict:
    return {k: _plain(v) if isinstance(v, Values) else v for k, v in values.values.items()}


def _check(recipe: Recipe, values: Values, problem: Problem) -> None:
    """What one key alone cannot show."""
    if recipe.path.stem != recipe.name and recipe.path.suffix in SUFFIXES:
        problem(values.lines["name"], f"name is {recipe.name!r}, but the file is called {recipe.path.name}")
    for param in recipe.params:
        _check_param(param, values.get("params")[param.name], problem)
    _check_steps(recipe, values.get("steps"), problem)
    _check_texts(recipe, values, problem)
    for example, about in zip(recipe.examples, values.get("examples", ()), strict=True):
        _check_example(recipe, example, about, problem)
    sources = values.get("sources") or Values()
    patterns = [(sources.lines["match"], PLACEHOLDER.sub("x", pattern)) for pattern in recipe.match]
    for owner in (values, *values.get("examples", ())):
        expect = owner.get("expect") or Values()
        if "matches" in expect.lines:
            patterns.append((expect.lines["matches"], expect.get("matches")))
    for line, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problem(line, f"{pattern!r} is not a regular expression: {error}")


def _check_param(param: Param, values: Values, problem: Problem) -> None:
    if (param.type == "choice") != bool(param.choices):
        problem(values.line, f"params.{param.name}: choices belong to type choice, and to no other")
    elif "default" in values.lines and "required" in values.lines:
        problem(values.lines["required"], f"params.{param.name} has a default, so it cannot be required")
    elif param.default is None and not values.get("required"):
        problem(values.line, f"params.{param.name} needs a default, or required: true")
    elif param.default is not None and mismatch(param, param.default):
        problem(values.lines.get("default", 0), f"params.{param.name}.default {mismatch(param, param.default)}")


def _check_example(recipe: Recipe, example: Example, values: Values, problem: Problem) -> None:
    if (example.text is None) == (not example.paths):
        problem(values.line, "an example needs either text or paths")
    try:
        recipe.values(example.params)
    except InputError as error:
        problem(values.lines.get("params", values.line), f"in an example: {str(error).partition(': ')[2] or error}")


def _check_steps(recipe: Recipe, steps: list[Values], problem: Problem) -> None:
    earlier: list[str] = []
    for step, values in zip(recipe.steps, steps, strict=True):
        if step.id in earlier:
            problem(values.lines["id"], f"two steps are called {step.id!r}")
        for name in step.inputs:
            if name not in earlier:
                hint = suggest(name, tuple(earlier)) if earlier else "it is the first"
                problem(values.lines["from"], f"no step {name!r} comes before {step.id!r}; {hint}")
        earlier.append(step.id)
        if step.schema is not None:
            _check_schema(step.schema, values.lines["schema"], problem)


def _check_schema(schema: str | dict, line: int, problem: Problem) -> None:
    from nsa_cli.schema import parse_schema

    try:
        parse_schema(schema)
    except InputError as error:
        problem(line, str(error))


def _check_texts(recipe: Recipe, values: Values, problem: Problem) -> None:
    """Every {{ in a text that parameters are put into is a placeholder of a parameter that exists."""
    sources, expect = (values.get(name) or Values() for name in ("sources", "expect"))
    texts: list[tuple[int, str | None]] = [(values.lines.get("system", 0), values.get("system"))]
    for step in values.get("steps"):
        texts += [(step.lines[key], step.get(key)) for key in ("prompt", "system") if key in step.lines]
    for group, keys in ((sources, ("include", "exclude", "match")), (expect, ("contains", "excludes"))):
        texts += [(group.lines[key], text) for key in keys for text in group.get(key, ())]
    known = tuple(param.name for param in recipe.params)
    for line, text in texts:
        for name in PLACEHOLDER.findall(text or ""):
            if name[0] not in known:
                hint = suggest(name[0], known) if known else "the recipe has none"
                problem(line, f"no parameter {name[0]!r}; {hint}")
        if "{{" in PLACEHOLDER.sub("", text or ""):
            problem(line, "{{ must begin the name of a parameter, such as {{ name }}")
