"""`nsa_cli.api`: the commands from Python say what the commands say."""

import json

import pytest

from nsa_cli.api import NSA
from nsa_models.errors import BudgetError, InputError, ModelError, NSAError

TEXT = "the quick brown fox jumps over the lazy dog and runs away\n" * 20
RECIPE = """
name: count
description: Count.
params: {what: {type: string, required: true, help: What.}}
steps: [{id: all, prompt: "How many {{ what }}?"}]
expect: {max_words: 1}
"""
VARYING = ("timings", "usage", "peak_memory_bytes")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT)
    (tmp_path / "in" / "b.md").write_text("# the other animals\n\nin the old forest\n")
    return tmp_path / "in"


@pytest.fixture
def model(nsa, tiny_checkpoint) -> NSA:
    return NSA(tiny_checkpoint, quiet=True)


def steady(answer: dict) -> dict:
    return {key: value for key, value in answer.items() if key not in VARYING}


def test_each_method_answers_as_its_command_does(nsa, model, folder, capsys):
    ask = json.loads(nsa("ask", folder, "who runs?", "--max-tokens", 9, "--include", "*.txt", "--json").out)
    pieces: list[str] = []
    reply = model.ask("who runs?", folder, max_tokens=9, include=["*.txt"], tell=pieces.append)
    assert steady(reply.to_json()) == steady(ask) and "".join(pieces) == reply.text
    again = model.ask("who jumps?", folder, max_tokens=9, include="*.txt")
    assert again.usage.cached_tokens > 64 and again.timings.load_s < 0.1  # held in memory

    summary = json.loads(nsa("summarize", folder, "--length", "short", "--max-tokens", 9, "--json").out)
    assert steady(model.summarize(folder, length="short", max_tokens=9).to_json()) == steady(summary)

    (folder / "count.yaml").write_text(RECIPE)
    run = nsa("run", folder / "count.yaml", folder / "a.txt", "--what", "dogs", "--max-tokens", 9, "--json")
    counted = model.run(folder / "count.yaml", folder / "a.txt", params={"what": "dogs"}, max_tokens=9)
    assert run.code == 6 and steady(counted.to_json()) == steady(json.loads(run.out)) and counted.failed

    jobs = [{"id": i, "text": TEXT, "question": f"who {i}?"} for i in (2, 1)] + [{"id": 3, "text": TEXT}]
    lines = nsa("batch", "-", "--max-tokens", 9, stdin="\n".join(map(json.dumps, jobs))).out.splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "job"} for line in lines]
    assert list(map(steady, model.batch(jobs, max_tokens=9))) == list(map(steady, records))
    capsys.readouterr()


def test_a_text_and_a_schema(model):
    reply = model.ask("who?", text=TEXT, schema={"enum": ["fox", "dog"]}, max_tokens=30)
    assert reply.data in ("fox", "dog") and json.loads(reply.text) == reply.data


def test_long_text_is_read_in_parts_where_that_is_wished_for(model):
    how = dict(text=TEXT, max_context=300, max_tokens=9)
    with pytest.raises(BudgetError):
        model.ask("who runs?", **how)
    assert model.ask("who runs?", **how, overflow="shard").shards > 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(max_tokns=3), "No such option '--max-tokns'"),
        (dict(max_tokens=0), "0 is not in the range x>=1"),
        (dict(order="random"), "'random' is not one of"),
        (dict(text="a", include=["*.py"], no_such=None, bogus=True), "--bogus"),
    ],
)
def test_what_the_command_line_refuses_is_refused(model, folder, wrong, says):
    paths = [] if "text" in wrong else [folder]
    with pytest.raises(InputError, match=says):
        model.ask("who?", *paths, **wrong)


def test_errors_are_those_of_the_commands(model, folder):
    for paths, text in (([], None), ([folder], "a"), ([folder / "nowhere"], None)):
        with pytest.raises(InputError):
            model.ask("who?", *paths, text=text)
    with pytest.raises(ModelError):
        NSA("no-such-model").ask("who?", text="a")
    with pytest.raises(NSAError):
        NSA(device="tpu")


def test_it_says_as_much_as_it_was_asked_to(nsa, model, folder, tiny_checkpoint, capsys):
    how = dict(text=TEXT, max_context=300, max_tokens=9)
    capsys.readouterr()
    model.summarize(**how)
    assert capsys.readouterr() == ("", "")
    NSA(tiny_checkpoint).summarize(**how)
    out, err = capsys.readouterr()
    assert out == "" and "part 1 of" in err
