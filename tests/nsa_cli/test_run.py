"""`nsa run`: options made from parameters, who decides what, expectations, and steps over parts."""

import json
from pathlib import Path

import pytest

SHORT = """\
name: mine
description: Say something.
params:
  tone: {type: choice, choices: [kind, stern], default: kind, help: How to say it.}
  count: {type: int, required: true, help: How many.}
  very_loud: {type: bool, help: In capitals.}
generate: {max_tokens: 7}
steps:
  - {id: notes, over: file, prompt: "{{ count }} {{ tone }} {{ very_loud }}", generate: {max_tokens: 5}}
  - {id: report, from: [notes], prompt: Report.}
"""


@pytest.fixture
def docs(tmp_path: Path, monkeypatch) -> str:
    for name in ("a.txt", "b.txt"):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / name).write_text(f"the quick fox {name} jumps {{{{ count }}}} over the dog\n" * 9)
    monkeypatch.chdir(tmp_path)
    return "docs"


def recipe(text: str) -> str:
    Path("mine.yaml").write_text(text)
    return "./mine.yaml"


def run(nsa, text: str, *args) -> dict:
    done = nsa("run", recipe(text), *args, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_parameters_are_options_with_types_help_and_defaults(nsa, docs):
    out = nsa("run", recipe(SHORT), "--help").out
    assert "--tone [kind|stern]" in out and "How to say it." in out and "[default: kind]" in " ".join(out.split())
    assert "--count INTEGER" in out and "[required]" in out and "--very-loud / --no-very-loud" in out
    assert "default: 7;" in " ".join(out.split())  # --max-tokens
    for wrong in ((), ("--count", "x"), ("--count", 1, "--tone", "rude"), ("--count", 1, "--no-such")):
        assert nsa("run", recipe(SHORT), docs, *wrong).code == 2
    assert nsa("run", recipe(SHORT), docs, "--count", 1, "--very-loud").code == 0
    assert nsa("run", "mine", docs).code == nsa("run", "no/mine.yaml", docs).code == 3
    assert nsa("run").out == nsa("run", "--help").out and "code-review" in nsa("run").out


def test_the_typed_outranks_the_recipe_which_outranks_the_environment(nsa, docs, monkeypatch):
    def tokens(*args) -> int:
        return run(nsa, SHORT, docs, "--count", 1, *args)["usage"]["completion_tokens"]

    assert tokens() == 5 + 5 + 7
    monkeypatch.setenv("NSA_MAX_TOKENS", "99")
    assert tokens() == 5 + 5 + 7
    assert tokens("--max-tokens", 20) == 5 + 5 + 20  # asked of the answer, not of the notes
    plain = SHORT.replace("generate: {max_tokens: 7}\n", "")
    monkeypatch.setenv("NSA_MAX_TOKENS", "9")
    assert run(nsa, plain, docs, "--count", 1)["usage"]["completion_tokens"] == 5 + 5 + 9


def test_document_text_is_no_template(nsa, docs, monkeypatch, tiny_checkpoint):
    import nsa_models
    from nsa_models import load_tokenizer

    seen: list[int] = []
    prefill = nsa_models.prefill

    def spy(model, ids, cache, **options):
        seen.extend(ids)
        return prefill(model, ids, cache, **options)

    monkeypatch.setattr(nsa_models, "prefill", spy)
    run(nsa, SHORT, docs, "--count", 41, "--no-cache")
    text = load_tokenizer(tiny_checkpoint).decode(seen)
    assert text.count("{{ count }}") == 18 and text.count("41 kind false") == 2


def test_the_answer_is_streamed_and_the_same_in_json(nsa, docs):
    reply = run(nsa, SHORT, docs, "--count", 1)
    shown = nsa("run", recipe(SHORT), docs, "--count", 1)
    assert shown.out == reply["answer"] + "\n" and "nsa: notes 2 of 2: b.txt, " in shown.err
    assert reply["recipe"] == "mine" and [p["part"] for p in reply["parts"]] == [""] and reply["shards"] == 2
    piped = nsa("run", recipe(SHORT), "--count", 1, stdin="the fox\n")
    assert piped.code == 0 and piped.out


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ("min_words: 1, max_words: 99", None),
        ("min_words: 50", "at least 50 expected"),
        ("max_words: 0", "at most 0 expected"),
        ("contains: [QQQ]", "'QQQ' is not in the answer"),
        ("excludes: ['']", None),
        ("matches: '^[0-9]+$'", "nothing in the answer matches"),
        ("matches: '[a-z]'", None),
        ("complete: true", "the answer was cut (length)"),
        ("citations: {min: 1}", "0 citations, at least 1 expected"),
        ("citations: {verified: 1}", None),
    ],
)
def test_what_is_expected_decides_the_exit_code(nsa, docs, expect, says):
    if expect == "excludes: ['']":  # an empty text is in every answer: refused before it can fail
        assert nsa("run", recipe(SHORT + f"expect: {{{expect}}}\n"), docs, "--count", 1).code == 3
        return
    done = nsa("run", recipe(SHORT + f"expect: {{{expect}}}\n"), docs, "--count", 1, "--json")
    assert done.code == (6 if says else 0), done.err
    failed = json.loads(done.out)["failed"]
    assert failed == [] if says is None else says in failed[0] and f"nsa: recipe mine: {failed[0]}" in done.err


def test_an_answer_that_is_not_of_its_schema_is_exit_code_6_and_prints_nothing(nsa, docs):
    text = SHORT.replace("prompt: Report.", "prompt: Report., schema: 'name, age int'")
    done = nsa("run", recipe(text), docs, "--count", 1)
    assert (done.code, done.out) == (6, "") and "cut at 7 tokens" in done.err


def test_a_part_that_is_too_long_is_read_in_parts_that_say_which(nsa, docs):
    text = SHORT.replace("  - {id: report, from: [notes], prompt: Report.}\n", "")
    reply = run(nsa, text, docs, "--count", 1, "--max-context", 250)
    labels = [part["part"] for part in reply["parts"]]
    assert len(labels) > 2 and all(label.startswith(("a.txt (a.txt:", "b.txt (b.txt:")) for label in labels)
    assert reply["answer"].count("## ") == len(labels)


def test_ctrl_c_before_the_last_part_prints_no_answer(nsa, docs, monkeypatch):
    import nsa_cli.steps

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(nsa_cli.steps, "answer", interrupted)
    done = nsa("run", recipe(SHORT), docs, "--count", 1)
    assert (done.code, done.out) == (130, "")


PACKED = """\
name: mine
description: Say something.
context: {max_context: 700, overflow: drop, order: recency, levels: ["/a.txt=name"]}
steps:
  - {id: only, prompt: Say something., generate: {max_tokens: 5}}
"""


def test_a_recipe_says_how_files_are_packed_unless_that_is_typed(nsa, docs):
    for name in "cde":
        Path(docs, f"{name}.txt").write_text("the quick fox jumps over the dog\n" * 30)
    reply = nsa("run", recipe(PACKED), docs)
    assert reply.code == 0 and "left out to fit" in reply.err, reply.err
    assert "shards" not in reply.err and "a.txt (" not in reply.err  # only named, so it takes no room
    assert nsa("run", recipe(PACKED), docs, "--overflow", "error").code == 4
    assert nsa("run", recipe(PACKED.replace("drop", "error")), docs).code == 4
    assert "default: drop]" in " ".join(nsa("run", recipe(PACKED), "--help").out.split())
    for right, wrong in (("drop", "dropp"), ("recency", "size"), ("=name", "=half")):
        done = nsa("run", recipe(PACKED.replace(right, wrong, 1)), docs)
        assert done.code == 3 and "mine.yaml:3: context." in done.err
