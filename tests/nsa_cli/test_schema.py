"""The form of an answer: JSON schemas and their short form, and what is refused."""

import json

import pytest

from nsa_cli.schema import Schema, load_schema, parse_schema
from nsa_models.errors import CheckError, InputError


def test_the_short_form():
    schema = parse_schema("name, age int, share float, sure bool, tags str[], bio: one sentence, n int: how many").json
    types = {name: field["type"] for name, field in schema["properties"].items()}
    assert types == {
        "name": "string",
        "age": "integer",
        "share": "number",
        "sure": "boolean",
        "tags": "array",
        "bio": "string",
        "n": "integer",
    }
    assert schema["properties"]["tags"]["items"] == {"type": "string"}
    assert schema["properties"]["bio"]["description"] == "one sentence"
    assert schema["required"] == list(types) and schema["additionalProperties"] is False
    assert parse_schema("[name, age int]").json == {"type": "array", "items": parse_schema("name, age int").json}
    assert parse_schema("a: x, y\nb int").json["properties"]["a"]["description"] == "x, y"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no field"),
        ("[]", "no field"),
        ("name, na me x", "is not a field"),
        ("a, a int", "two fields"),
        ("{", "not JSON"),
        ('{"type": "objekt"}', "not a JSON schema"),
        ("a" * 5000 + "!", "is not a field"),
    ],
)
def test_what_is_no_schema_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        load_schema(text)


def test_a_schema_is_read_from_a_file(tmp_path):
    file = tmp_path / "s.json"
    file.write_text('{"type": "integer"}')
    assert load_schema(str(file)) == Schema({"type": "integer"})
    for content, says in ((b"[1]", "is an object"), (b"\xff", "not UTF-8"), (b"{}" * 500_001, "more than a schema")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=says):
            load_schema(str(file))


def test_the_instruction_shows_the_form():
    schema = parse_schema("name, age int, tags str[], bio: one sentence")
    shown = '{"name": string, "age": integer, "tags": [string, ...], "bio": one sentence}'
    assert schema.instruction() == f"Answer in JSON: {shown}"
    assert Schema({"enum": ["a", 1]}).instruction() == 'Answer in JSON: "a" or 1'


def test_the_answer_is_checked_when_it_is_whole():
    schema = parse_schema("n int")
    assert schema.value('{"n": 1}', 9, cut=True) == {"n": 1}
    for text, cut, says in (
        ('{"n"', False, "not JSON"),
        ('{"n"', True, "cut at 9 tokens"),
        ('{"n": "1"}', False, "at "),
    ):
        with pytest.raises(CheckError, match=says):
            schema.value(text, 9, cut)


def test_ask_prints_json_of_the_schema(nsa, tmp_path):
    (tmp_path / "a.txt").write_text("Ada is 36 years old and lives in London.\n" * 20)
    ask = ("ask", tmp_path / "a.txt", "how old?", "--max-tokens", 400, "--schema")
    form = json.dumps({"type": "object", "properties": {"n": {"type": "integer", "maximum": 9999, "minimum": 0}}})
    form = form[:-1] + ', "required": ["n"], "additionalProperties": false}'
    run = nsa(*ask, form)
    assert run.code == 0, run.err
    assert list(json.loads(run.out)) == ["n"]
    reply = json.loads(nsa(*ask, form, "--json").out)
    assert reply["data"] == json.loads(reply["answer"]) == json.loads(run.out) and reply["finish_reason"] == "stop"
    plain = json.loads(nsa(*ask[:-1], "--json").out)
    assert reply["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] and "data" not in plain


def test_it_fails_closed(nsa, tmp_path):
    (tmp_path / "a.txt").write_text("Ada is 36 years old.\n")
    ask = ("ask", tmp_path / "a.txt", "how old?", "--max-tokens", 5)
    run = nsa(*ask, "--schema", "name")  # cut inside the text
    assert (run.code, run.out) == (6, "") and "cut at 5 tokens; --max-tokens" in run.err
    for schema in ('{"type": "array", "uniqueItems": true}', "a b c"):
        run = nsa(*ask, "--schema", schema)
        assert (run.code, run.out) == (3, "")
