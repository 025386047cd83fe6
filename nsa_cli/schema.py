"""The JSON an answer must be: a JSON schema, or the short form `name, age int, bio: one sentence`."""

import json
import os
import re
from dataclasses import dataclass

from nsa_cli.text_file import read_text
from nsa_models.errors import CheckError, InputError

MAX_CHARS = 1_000_000
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
FIELD = re.compile(
    r"(?P<name>[A-Za-z_][\w-]*)(?:\s+(?P<type>str|int|float|bool)(?P<many>\[\])?)?(?:\s*:\s*(?P<about>.*))?"
)
OUTLINE_DEPTH = 4


@dataclass(frozen=True)
class Schema:
    """json: a JSON schema. The answer is generated under it token by token, and checked once more when it is whole."""

    json: dict

    def instruction(self) -> str:
        """What tells the model the form that it will be held to."""
        return f"Answer in JSON: {_outline(self.json, OUTLINE_DEPTH)}"

    def value(self, text: str, tokens: int, cut: bool) -> object:
        """The value that `text` is. Raises CheckError if it is none, or not one of this schema's."""
        import jsonschema
        import referencing

        try:
            found = json.loads(text)
            kind = jsonschema.validators.validator_for(self.json, jsonschema.Draft202012Validator)
            # An explicit registry: the default one fetches references from the network.
            kind(self.json, registry=referencing.Registry()).validate(found)
        except json.JSONDecodeError as error:
            if cut:
                raise CheckError(f"the JSON was cut at {tokens:,} tokens; --max-tokens gives it more") from None
            raise CheckError(f"the answer is not JSON: {error}") from None
        except jsonschema.ValidationError as error:
            raise CheckError(f"the answer does not follow the schema: {error.message} at {error.json_path}") from None
        return found


def load_schema(file_or_text: str) -> Schema:
    """What `--schema` names: a file that holds a JSON schema, or else a schema in either form."""
    if not os.path.isfile(file_or_text):
        return parse_schema(file_or_text)
    text = read_text(file_or_text, MAX_CHARS + 1)
    if len(text) > MAX_CHARS:
        raise InputError(f"{file_or_text}: more than a schema may have, {MAX_CHARS:,} characters")
    return parse_schema(_from_json(text, file_or_text))


def parse_schema(source: str | dict) -> Schema:
    """A JSON schema as a mapping or a text, or the short form. Raises InputError."""
    if isinstance(source, str):
        source = source.strip()
        source = _from_json(source, "schema") if source.startswith("{") else _from_short(source)
    import jsonschema

    try:
        jsonschema.validators.validator_for(source, jsonschema.Draft202012Validator).check_schema(source)
    except jsonschema.SchemaError as error:
        raise InputError(f"not a JSON schema: {error.message} at {error.json_path}") from None
    return Schema(source)


def _from_json(text: str, name: str) -> dict:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{name}: a JSON schema is an object")
    return found


def _from_short(text: str) -> dict:
    """`name, age int, tags str[], bio: one sentence`: an object of these fields; in brackets: a list of such objects.

    Fields end at a comma or a line end; a comma in a description needs line ends between the fields.
    """
    if text.startswith("[") and text.endswith("]"):
        return {"type": "array", "items": _from_short(text[1:-1])}
    properties: dict[str, dict] = {}
    for field in (part.strip() for part in re.split(r"\n" if "\n" in text.strip() else ",", text)):
        if not field:
            continue
        match = FIELD.fullmatch(field.rstrip(","))
        if not match:
            raise InputError(f"schema: {field!r} is not a field; write: name, age int, tags str[], bio: one sentence")
        if match["name"] in properties:
            raise InputError(f"schema: two fields are called {match['name']!r}")
        kind: dict = {"type": TYPES[match["type"] or "str"]}
        if match["many"]:
            kind = {"type": "array", "items": kind}
        properties[match["name"]] = kind | ({"description": match["about"]} if match["about"] else {})
    if not properties:
        raise InputError("schema: no field; write: name, age int, tags str[], bio: one sentence")
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _outline(schema: object, depth: int) -> str:
    """A line that shows the form: {"name": string, "tags": [string, ...]}."""
    if not isinstance(schema, dict) or not depth:
        return "..."
    if "enum" in schema:
        return " or ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"[{_outline(schema.get('items'), depth - 1)}, ...]"
    if isinstance(schema.get("properties"), dict):
        fields = (f"{json.dumps(k)}: {_outline(v, depth - 1)}" for k, v in schema["properties"].items())
        return "{" + ", ".join(fields) + "}"
    return str(schema.get("description") or schema.get("type") or "...")
