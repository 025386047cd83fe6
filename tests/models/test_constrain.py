"""Constrained decoding: whatever the logits want, the text is JSON of the schema; what cannot be is refused."""

import json

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_models import load_tokenizer
from nsa_models.constrain import Constraint, of_paths, of_schema
from nsa_models.errors import CheckError, InputError, ModelError

OBJECT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "é", None]},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "kind", "tags", "sure"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": OBJECT, "minItems": 1, "maxItems": 2}
VOCAB = 400  # more than the tokenizer's, as where a model's embedding is padded


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


def generate(tokenizer, schema: dict, seed: int, limit: int = 2000) -> str:
    """Text from random logits that never change their mind about what is forbidden."""
    constraint, generator = Constraint(tokenizer, VOCAB, of_schema(schema)), torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < limit:
        logits = torch.randn(VOCAB, generator=generator) * 5
        logits[tokenizer.eos_ids[0]] += 3
        token = int(constraint.mask(logits).argmax())
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        constraint.advance(token)
        ids.append(token)
    raise AssertionError("it never ended")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([OBJECT, LIST, {"type": "string", "maxLength": 9}, {"type": "integer"}]))
def test_any_logits_give_json_of_the_schema(tokenizer, seed, schema):
    jsonschema.validate(json.loads(generate(tokenizer, schema, seed)), schema)


def test_what_is_allowed_keeps_its_logit(tokenizer):
    logits = torch.randn(VOCAB)
    masked = Constraint(tokenizer, VOCAB, of_schema(OBJECT)).mask(logits)
    allowed = masked.isfinite()
    assert torch.equal(masked[allowed], logits[allowed])
    pieces = [tokenizer.decode([i]) for i in allowed.nonzero().flatten().tolist()]
    assert pieces and all(piece.startswith("{") for piece in pieces)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "string"}},
        {"type": "array", "uniqueItems": True},
        {"type": "string", "format": "no-such"},
        {"$ref": "http://example.org/schema"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "no-such"},
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(tokenizer, schema):
    with pytest.raises(InputError, match="cannot be enforced: "):
        Constraint(tokenizer, VOCAB, of_schema(schema))


def test_a_token_against_the_schema_is_an_error_not_a_way_out(tokenizer):
    constraint = Constraint(tokenizer, VOCAB, of_schema(OBJECT))
    constraint.mask(torch.zeros(VOCAB))
    with pytest.raises(CheckError):
        constraint.advance(tokenizer.encode("x")[0])
    with pytest.raises(CheckError):
        constraint.mask(torch.zeros(VOCAB))


def test_a_tokenizer_without_an_end_is_refused(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.eos_ids = ()
    with pytest.raises(ModelError, match="no end token"):
        Constraint(tokenizer, VOCAB, of_schema(OBJECT))


PATHS = ["src/a.py", "src/sub/b c.py", "src/sub/[x]+.md", "é/ü.py", "top.txt"]


def follows(tokenizer, paths, text: str) -> bool:
    """Whether a constraint lets the text be said, to its end."""
    constraint = Constraint(tokenizer, VOCAB, of_paths(paths))
    for token in (*tokenizer.encode(text), tokenizer.eos_ids[0]):
        if not constraint.mask(torch.zeros(VOCAB))[token].isfinite():
            return False
        if token not in tokenizer.eos_ids:
            constraint.advance(token)
    return True


KNOWN = ("src", "src/", "src/a.py", "`src/a.py`.", "See src/a.py: 3\nand src/sub.", "src/a.py:3-4, yes", "é/ü.py")
ODD = ("src/sub/b c.py", "(src/sub/[x]+.md)", "./x src/a.py...", "ünder src/a.py's")
OTHERS = ("", "no path", "other/x.py", "a/b and/or c", "top.txt x", "x.srcs/a", "top.txt/x")


@pytest.mark.parametrize("text", [*KNOWN, *ODD, *OTHERS])
def test_paths_that_are_known_and_all_else_may_be_said(tokenizer, text):
    assert follows(tokenizer, PATHS, text)


@pytest.mark.parametrize(
    "text", ["src/b.py", "see `src/aa.py`", "src/a", "src/a.pyx", "src/sub/b", "é/u.py", "x\nsrc/x"]
)
def test_paths_that_are_not_known_may_not(tokenizer, text):
    assert not follows(tokenizer, PATHS, text)


def test_without_a_folder_there_is_nothing_to_make_up():
    assert of_paths([]) is of_paths(["a.py", "b c/x.py"]) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=6).map(lambda name: f"src/x{name.replace('/', '')}"), min_size=1, max_size=3))
def test_a_path_may_have_any_character(tokenizer, paths):
    assert follows(tokenizer, paths, f"It is {paths[0]} there")
    assert not follows(tokenizer, paths, "It is src/Aaaaaaa there")
