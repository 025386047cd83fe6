"""The keys of a recipe: one table, by which recipes are checked and from which editors' JSON schema is made."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import click

from nsa_cli.packing import LEVELS, ORDERS, OVERFLOWS
from nsa_cli.safe_yaml import Node
from nsa_cli.units import parse_quantity

NAME = "[a-z][a-z0-9]*([-_][a-z0-9]+)*"
Problem = Callable[[int, str], None]  # told (line, what is wrong)


@dataclass(frozen=True)
class Text:
    """A text that is not empty; of `choices`, or like `pattern`, if they are given."""

    choices: tuple[str, ...] = ()
    pattern: str = ""
    empty: bool = False

    def read(self, node: Node, where: str, problem: Problem):
        value = node.value
        if not isinstance(value, str):
            problem(node.line, f"{where} must be a text{'' if value is None else '; put it in quotes'}")
        elif self.choices and value not in self.choices:
            problem(node.line, f"{where} is {value!r}; {suggest(value, self.choices)}")
        elif self.pattern and not re.fullmatch(self.pattern, value):
            problem(node.line, f"{where} is {value!r}; it is written like {self.pattern}")
        elif not value.strip() and not self.empty:
            problem(node.line, f"{where} is empty")
        return value

    def schema(self) -> dict:
        found: dict = {"type": "string"}
        if not self.empty:
            found["minLength"] = 1
        if self.choices:
            found["enum"] = list(self.choices)
        if self.pattern:
            found["pattern"] = f"^(?:{self.pattern})$"
        return found


@dataclass(frozen=True)
class Number:
    """A number in low..high; whole or not."""

    low: float
    high: float
    whole: bool = False
    open: bool = False  # low itself is too low

    def read(self, node: Node, where: str, problem: Problem):
        value = node.value
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            problem(node.line, f"{where} must be a {'whole ' * self.whole}number")
        elif not self.low <= value <= self.high or (self.open and value == self.low):
            above = "above" if self.open else "at least"
            problem(node.line, f"{where} is {value}; it must be {above} {self.low:g} and at most {self.high:g}")
        return value

    def schema(self) -> dict:
        low = "exclusiveMinimum" if self.open else "minimum"
        return {"type": "integer" if self.whole else "number", low: self.low, "maximum": self.high}


@dataclass(frozen=True)
class Flag:
    def read(self, node: Node, where: str, problem: Problem):
        if not isinstance(node.value, bool):
            problem(node.line, f"{where} must be true or false")
        return node.value

    def schema(self) -> dict:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Quantity:
    """A count as people write it: 4096 or 32k."""

    def read(self, node: Node, where: str, problem: Problem):
        try:
            if isinstance(node.value, (int, str)) and not isinstance(node.value, bool):
                return parse_quantity(str(node.value))
        except click.BadParameter:
            pass
        problem(node.line, f"{where} must be a number of tokens, such as 4096 or 32k")
        return None

    def schema(self) -> dict:
        return {"type": ["integer", "string"], "minimum": 1, "minLength": 1}


@dataclass(frozen=True)
class Scalar:
    """A text, a number, true or false."""

    def read(self, node: Node, where: str, problem: Problem):
        if node.value is None or isinstance(node.value, (list, dict)):
            problem(node.line, f"{where} must be a text, a number, true or false")
        return node.value

    def schema(self) -> dict:
        return {"type": ["string", "number", "boolean"]}


@dataclass(frozen=True)
class JSONSchema:
    """A JSON schema, or the short form that `--schema` takes."""

    def read(self, node: Node, where: str, problem: Problem):
        if not isinstance(node.value, (str, dict)) or not node.value:
            problem(node.line, f"{where} must be a JSON schema, or its short form such as 'name, age int'")
        return node.plain()

    def schema(self) -> dict:
        return {"type": ["string", "object"]}


@dataclass(frozen=True)
class ListOf:
    kind: object

    def read(self, node: Node, where: str, problem: Problem):
        if not isinstance(node.value, list):
            problem(node.line, f"{where} must be a list")
            return []
        if not node.value:
            problem(node.line, f"{where} is empty; leave it out")
        return [self.kind.read(item, f"{where}[{i}]", problem) for i, item in enumerate(node.value)]

    def schema(self) -> dict:
        return {"type": "array", "items": self.kind.schema(), "minItems": 1}


@dataclass(frozen=True)
class Key:
    kind: object
    help: str
    required: bool = False


@dataclass(frozen=True)
class Keys:
    """A mapping with these keys and no others."""

    keys: dict[str, Key]

    def read(self, node: Node, where: str, problem: Problem):
        """The values by key, with `line`, the lines of all of them."""
        if not isinstance(node.value, dict):
            problem(node.line, f"{where or 'a recipe'} must be a mapping of keys")
            return Values()
        prefix = f"{where}." if where else ""
        for name, value in node.value.items():
            if name not in self.keys:
                problem(value.line, f"unknown key {prefix + name!r}; {suggest(name, tuple(self.keys))}")
        for name, key in self.keys.items():
            if key.required and name not in node.value:
                problem(node.line, f"{prefix}{name} is missing")
        found = {name: value for name, value in node.value.items() if name in self.keys}
        return Values(
            {name: self.keys[name].kind.read(value, prefix + name, problem) for name, value in found.items()},
            {name: value.line for name, value in found.items()},
            node.line,
        )

    def schema(self) -> dict:
        required = [name for name, key in self.keys.items() if key.required]
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: key.kind.schema() | {"description": key.help} for name, key in self.keys.items()},
            **({"required": required} if required else {}),
        }


@dataclass(frozen=True)
class Named:
    """A mapping from names of one's own to values of one kind."""

    kind: object

    def read(self, node: Node, where: str, problem: Problem):
        if not isinstance(node.value, dict):
            problem(node.line, f"{where} must be a mapping of names")
            return {}
        for name, value in node.value.items():
            if not re.fullmatch(NAME, name):
                problem(value.line, f"{where}: the name {name!r} must be lower case, such as max_items")
        return {name: self.kind.read(value, f"{where}.{name}", problem) for name, value in node.value.items()}

    def schema(self) -> dict:
        names = {"pattern": f"^(?:{NAME})$"}
        return {"type": "object", "propertyNames": names, "additionalProperties": self.kind.schema()}


@dataclass
class Values:
    """What was read from a mapping: values and lines by key, and the mapping's own line."""

    values: dict = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    line: int = 0

    def get(self, name: str, default=None):
        return self.values.get(name, default)


def suggest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


TYPES = ("string", "int", "float", "bool", "choice")
PARTS = ("document", "file", "chapter", "shard")

PARAM = Keys(
    {
        "type": Key(Text(TYPES), "What values it takes.", required=True),
        "default": Key(Scalar(), "Its value where the command line gives none."),
        "choices": Key(ListOf(Text()), "The values of a choice."),
        "required": Key(Flag(), "Whether the command line must give it."),
        "help": Key(Text(), "What it is for, as `nsa run NAME --help` says it.", required=True),
    }
)
SOURCES = Keys(
    {
        "include": Key(ListOf(Text()), "Read only files of folders that match these .gitignore patterns."),
        "exclude": Key(ListOf(Text()), "Leave out what matches these patterns."),
        "match": Key(ListOf(Text()), "Read only lines in which one of these regular expressions is found."),
        "around": Key(Number(0, 1000, whole=True), "Lines before and after each line that matches. Default: 0."),
    }
)
CONTEXT = Keys(
    {
        "max_context": Key(Quantity(), "Most tokens of text, prompt and answer at a time, such as 8k."),
        "evidence": Key(Number(0, 1000, whole=True), "Most places to name; 0 = none."),
        "reread": Key(Number(0, 10**6, whole=True), "Answer from so many tokens where a prompt leads; 0 = from all."),
        "order": Key(Text(ORDERS), "Of files; what matters most comes last."),
        "prefer": Key(ListOf(Text()), "Patterns of the files that matter most: they come last, and are dropped last."),
        "overflow": Key(Text(OVERFLOWS), "What to do where files do not fit. Default: shard, read them in parts."),
        "levels": Key(ListOf(Text(pattern=f".+=({'|'.join(LEVELS)})")), "Detail of matching files: 'tests=outline'."),
    }
)
SHARE = Number(0, 1)
GENERATE = Keys(
    {
        "max_tokens": Key(Number(1, 10**6, whole=True), "Longest answer."),
        "temperature": Key(Number(0, 100), "0 = greedy."),
        "top_p": Key(SHARE, "Keep the likeliest tokens up to this mass."),
        "top_k": Key(Number(0, 10**6, whole=True), "Keep the k likeliest tokens; 0 = all."),
        "min_p": Key(SHARE, "Keep tokens this likely against the likeliest."),
        "repeat_penalty": Key(Number(0, 100, open=True), "Above 1, an answer repeats itself less."),
        "seed": Key(Number(0, 2**53, whole=True), "Of the sampling."),
        "stop": Key(ListOf(Text()), "End the answer before any of these texts."),
    }
)
STEP = Keys(
    {
        "id": Key(Text(pattern=NAME), "Its name, for the `from` of later steps.", required=True),
        "over": Key(Text(PARTS), "What it reads at a time: all at once (document, the default), or part by part."),
        "from": Key(ListOf(Text(pattern=NAME)), "Read what these earlier steps answered, instead of the sources."),
        "prompt": Key(Text(), "What to ask about each of them; {{ name }} stands for a parameter.", required=True),
        "system": Key(Text(), "System message of this step."),
        "generate": Key(GENERATE, "How to generate, in this step."),
        "schema": Key(JSONSchema(), "The answer is JSON of this schema."),
    }
)
CITATIONS = Keys(
    {
        "min": Key(Number(0, 1000, whole=True), "Fewest quotes and path:line references."),
        "verified": Key(SHARE, "Least share of them that the text holds."),
    }
)
EXPECT = Keys(
    {
        "min_words": Key(Number(0, 10**6, whole=True), "Fewest words of the answer."),
        "max_words": Key(Number(0, 10**6, whole=True), "Most words of the answer."),
        "contains": Key(ListOf(Text()), "Texts that the answer must hold, in any case of letters."),
        "excludes": Key(ListOf(Text()), "Texts that it must not hold."),
        "matches": Key(Text(), "A regular expression that must be found in it."),
        "complete": Key(Flag(), "The answer must not have been cut at max_tokens."),
        "citations": Key(CITATIONS, "Quotes and path:line references in the answer, checked against the text."),
    }
)
EXAMPLE = Keys(
    {
        "text": Key(Text(), "The text to read."),
        "paths": Key(ListOf(Text()), "Or files and folders to read, from the recipe's own folder."),
        "params": Key(Named(Scalar()), "Parameters, where they are not to have their defaults."),
        "expect": Key(EXPECT, "What must be true of the answer, besides what the recipe expects."),
    }
)
RECIPE = Keys(
    {
        "name": Key(Text(pattern=NAME), "Its name: that of the file, without .yaml.", required=True),
        "description": Key(Text(), "One line that says what it does.", required=True),
        "params": Key(Named(PARAM), "Parameters: each is an option of `nsa run NAME`."),
        "sources": Key(SOURCES, "What is read of the files and folders that are named."),
        "context": Key(CONTEXT, "How much is read at a time."),
        "system": Key(Text(), "System message, in place of the model's own."),
        "generate": Key(GENERATE, "How to generate."),
        "steps": Key(ListOf(STEP), "What is asked, in order; the last step's answer is the recipe's.", required=True),
        "expect": Key(EXPECT, "What must be true of the answer; else the exit code is 6."),
        "examples": Key(ListOf(EXAMPLE), "What to try it on: nsa recipes test NAME."),
    }
)


def json_schema() -> dict:
    """For editors: what a recipe may hold."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "nsa recipe", **RECIPE.schema()}
