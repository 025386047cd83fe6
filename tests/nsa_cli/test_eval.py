"""`nsa eval` from outside, and its measures against an independent computation."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa_cli.evaluate import Row, are_named, table
from nsa_cli.evidence import Evidence
from nsa_models import Cache, load_model, load_tokenizer
from nsa_models.evaluate import Reader, Trial, perplexity, share, tokens_read
from nsa_models.training.tasks import Task, is_right, short_tasks
from nsa_models.training.wordings import TAKES
from tests.models.tiny import random_model

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [part for name in ("full", "nsa", "h2o", "quest", "streaming") for part in ("--attention", name)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(6):
        lines = [f"def part_{i}_{j}(left_{j}, right):\n    return left_{j}\n\n" for j in range(12)]
        (folder / f"part{i}.py").write_text("".join(lines))
    return folder


def test_a_table_of_every_attention(nsa, text):
    run = nsa(
        *("eval", "--text", text, "--lengths", "400,900", "--task", "perplexity", "--task", "needle", *ALL),
        *("--samples", "1", "--depths", "1"),
    )
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    assert lines[0].split() == ["task", "tokens", "full", "nsa", "h2o", "quest", "streaming"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["perplexity", "400"], ["perplexity", "900"], ["needle", "400"], ["needle", "900"]
    ]  # fmt: skip
    assert "0 % [0, 79]" in lines[3]
    assert lines[-1].split()[3:] == ["900", "900"] + ["375"] * 4, "4 blocks of 64, a window of 64, 55 compressed"


def test_json_has_every_reply_and_a_map_is_drawn(nsa, text, tmp_path):
    run = nsa(
        *("eval", "--text", text, "--lengths", "500", "--task", "takes", "--task", "defines", "--json"),
        *("--samples", "1", "--depths", "3", "--heat-map", tmp_path / "map.png"),
    )
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found["schema_version"] == 1 and len(found["results"]) == 4
    takes = found["results"][0]
    assert (takes["task"], takes["length"], takes["attention"], takes["samples"]) == ("takes", 500, "full", 3)
    assert takes["value"] == 0 and takes["low"] == 0 and 0.5 < takes["high"] < 0.6
    assert [round(t["depth"], 2) for t in takes["trials"]] == [0.17, 0.5, 0.83]
    assert all(t["tokens"] <= 500 and t["question"] and t["place"].startswith("part") for t in takes["trials"])
    both = [[t["question"] for t in r["trials"]] for r in found["results"][:2]]
    assert both[0] == both[1], "every attention gets the same prompts"
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_wording_that_is_not_practised(nsa, text):
    """The same questions of the same texts in other words, under every kind of attention."""
    asked = {}
    for wording in ("usual", "held-out"):
        run = nsa(
            *("eval", "--text", text, "--lengths", "900", "--task", "takes", "--json", "--wording", wording),
            *("--samples", "1", "--depths", "3", "--attention", "nsa", "--attention", "ask"),
        )
        assert run.code == 0, run.err
        found = json.loads(run.out)
        assert found["plan"]["wording"] == wording
        one, other = ([(t["question"], t["answer"]) for t in row["trials"]] for row in found["results"])
        assert one == other
        asked[wording] = one
    for (question, answer), (reworded, same) in zip(*asked.values(), strict=True):
        name = answer.split("(")[0]
        assert answer == same and question == TAKES.filled(name=name).usual and reworded != question
        assert reworded == TAKES.filled(name=name).held_out


def test_ask_is_asked_as_the_command_is(nsa, text, tiny_checkpoint, tmp_path):
    """A checkpoint that answers from the whole text says what `nsa` says there; one that rereads does not."""
    made = shutil.copytree(tiny_checkpoint, tmp_path / "made")
    settings = json.loads((made / "config.json").read_text())
    replies = {}
    for reread in (0, 400):
        (made / "config.json").write_text(json.dumps(settings | {"reread": reread}))
        run = nsa(
            *("eval", "--text", text, "--lengths", "900", "--task", "takes", "--task", "perplexity", "--json"),
            *("--samples", "1", "--depths", "4", "--attention", "nsa", "--attention", "ask", "--model", made),
        )
        assert run.code == 0, run.err
        nsa_row, ask_row, *rest = json.loads(run.out)["results"]
        assert [row["attention"] for row in (nsa_row, ask_row, *rest)] == ["nsa", "ask", "nsa"]
        assert all(a["tokens"] == b["tokens"] for a, b in zip(nsa_row["trials"], ask_row["trials"], strict=True))
        assert all("named" in t for t in ask_row["trials"]) and not any("named" in t for t in nsa_row["trials"])
        replies[reread] = [[t["reply"].strip() for t in row["trials"]] for row in (nsa_row, ask_row)]
    assert replies[0][0] == replies[0][1] == replies[400][0] != replies[400][1]


def test_what_stands_in_a_text_is_asked_of_one_text_a_sample(nsa, text, monkeypatch):
    """At all depths and for every kind of task: it is read once. What is planted makes each text another."""
    import nsa_models

    lengths = []

    def counted(model, ids, *args, **options):
        lengths.append(len(ids))
        return prefill(model, ids, *args, **options)

    prefill = nsa_models.prefill
    monkeypatch.setattr(nsa_models, "prefill", counted)
    asked = ("eval", "--text", text, "--lengths", "900", "--attention", "ask", "--depths", "3")
    for tasks, samples, texts in ((("takes",), 2, 2), (("takes", "defines"), 1, 1), (("needle",), 2, 6)):
        lengths.clear()
        run = nsa(*asked, "--samples", samples, *(part for task in tasks for part in ("--task", task)), "--json")
        assert run.code == 0, run.err
        row = json.loads(run.out)["results"][-1]
        assert row["samples"] == 3 * samples
        assert [round(t["depth"], 2) for t in row["trials"]] == [0.17, 0.5, 0.83] * samples
        assert sum(length > 512 for length in lengths) == texts, lengths
        assert all(600 < t["tokens"] <= 900 for t in row["trials"])


def test_places_are_named_if_all_of_them_are():
    found = [Evidence("a.py", 3, 5, 9.0), Evidence("b.py", 1, 1, 2.0)]
    task = Task("values", (), "", "", ("7",), 0.0, (("a.py", 3), ("b.py", 1), ("a.py", 5)))
    assert are_named(task, found) is True and are_named(task, found[:1]) is False
    assert are_named(replace(task, places=(("a.py", 6),)), found) is False
    assert are_named(replace(task, kind="absent"), found) is None
    trials = [Trial(task, 9, 0.5, "", right, named) for right, named in ((True, True), (False, True), (True, False))]
    assert "67 % [21, 94], named 67 %" in table([Row("values", 9, "ask", 9, share(trials), trials)])
    trials = [replace(trial, named=None) for trial in trials]
    assert "named" not in table([Row("values", 9, "nsa", 9, share(trials), trials)])


def test_short_questions_need_no_text(nsa):
    run = nsa("eval", "--task", "short", "--text", "nowhere", "--attention", "nsa", "--json")
    assert run.code == 0, run.err
    (result,) = json.loads(run.out)["results"]
    assert result["samples"] == 50 and result["value"] == 0 and result["trials"][0]["answer"] == "Paris"
    assert all(t["reply"] and t["tokens"] < 200 for t in result["trials"])


def test_short_questions_are_judged_by_their_facts():
    tasks = short_tasks()
    assert len({task.question for task in tasks}) == 50
    assert all(task.facts and is_right(task, task.answer) and not is_right(task, "I do not know.") for task in tasks)


def test_perplexity_is_that_of_the_logits(tiny_checkpoint, text):
    model, tokenizer = load_model(tiny_checkpoint, "cpu", torch.float32), load_tokenizer(tiny_checkpoint)
    ids = tokenizer.encode((text / "part0.py").read_text())[:400]

    def logits(ids: list[int]) -> torch.Tensor:
        return model.logits(model.advance(torch.tensor(ids), Cache.for_model(model, len(ids))))

    loss = torch.nn.functional.cross_entropy(logits(ids[:200])[:-1], torch.tensor(ids[1:200]))
    got = perplexity(model, ids, 200, "nsa")
    assert math.isclose(got.value, math.exp(loss), rel_tol=1e-4) and got.low < got.value < got.high
    two = perplexity(model, ids, 200, "nsa", 5)
    second = torch.nn.functional.cross_entropy(logits(ids[200:400])[:-1], torch.tensor(ids[201:400]))
    assert two.samples == 2 and math.isclose(two.value, math.exp((loss + second) / 2), rel_tol=1e-4)


def test_perplexity_by_length_is_of_the_same_tokens(tiny_checkpoint, text):
    """The last 79 tokens of each window, after 121 others and after one."""
    model, tokenizer = load_model(tiny_checkpoint, "cpu", torch.float32), load_tokenizer(tiny_checkpoint)
    ids = tokenizer.encode((text / "part0.py").read_text())[:400]
    for length in (200, 80):
        losses = []
        for end in (200, 400):
            read = torch.tensor(ids[end - length : end])
            logits = model.logits(model.advance(read, Cache.for_model(model, length)))
            losses.append(torch.nn.functional.cross_entropy(logits[-80:-1], read[-79:]))
        got = perplexity(model, ids, length, "nsa", 2, longest=200, scored=79)
        assert math.isclose(got.value, math.exp(sum(losses) / 2), rel_tol=1e-4) and got.samples == 2


def test_the_tiny_model_reads_alike_where_all_is_read(tiny_checkpoint, text):
    model, tokenizer = load_model(tiny_checkpoint, "cpu", torch.float32), load_tokenizer(tiny_checkpoint)
    ids = tokenizer.encode((text / "part0.py").read_text())[:120]
    full = perplexity(model, ids, 120, "full").value
    for attention in ("h2o", "quest", "streaming"):
        assert math.isclose(perplexity(model, ids, 120, attention).value, full, rel_tol=1e-3)


@pytest.mark.parametrize("attention", ["h2o", "quest", "streaming"])
def test_replies_are_alike_where_all_is_read(tiny_checkpoint, attention):
    """The engine's decoding and the comparators' are two paths to the same tokens."""
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    ids = torch.randint(300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    full, other = (Reader(model, name, 80).generate(ids, 12, ends=()) for name in ("full", attention))
    assert len(full) == 12 and other == full
    for name in ("full", attention):
        assert Reader(model, name, 80).generate(ids, 12, ends=full[3:4]) == full[: full.index(full[3])]


@pytest.mark.parametrize("attention", ["full", "nsa", "h2o", "quest", "streaming"])
def test_a_text_that_two_prompts_begin_with_is_read_once(tiny_checkpoint, attention):
    """What was answered to the first changes nothing for the second."""
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(2)
    text, *questions = (torch.randint(300, (n,), generator=generator).tolist() for n in (700, 30, 40))
    reader = Reader(model, attention, 760, again=text)
    assert reader.cache.length == 700
    for question in (*questions, questions[0]):
        fresh = Reader(model, attention, 760, again=text).generate(text + question, 12, ends=())
        assert reader.generate(text + question, 12, ends=()) == fresh
        whole = Reader(model, attention, 760).generate(text + question, 12, ends=())
        assert attention == "h2o" or whole == fresh, "pieces of another length keep other heavy hitters"


@pytest.mark.parametrize(("biases", "expected"), [((0, 0, 0), 74 + 64 + 32), ((-14, 14, -14), 64), ((-14, 14, 0), 96)])
def test_a_branch_that_no_gate_lets_through_is_not_in_the_budget(biases, expected):
    """T/d compressed keys, n l' selected ones, w of the window (paper table 4): (300 - 8) / 4 + 1, 4 x 16 and 32."""
    model = random_model()
    for layer in model.model.layers:
        layer.attn.g_proj.weight.zero_()
        layer.attn.g_proj.bias.view(-1, 3).copy_(torch.tensor(biases, dtype=torch.float32))
    assert [tokens_read(model, name, 300) for name in ("nsa", "h2o", "full")] == [expected, expected, 300]
    model.model.layers[1].attn.g_proj.weight[0] = 0.1  # now what a token says counts too
    assert tokens_read(model, "quest", 300) == 74 + 64 + 32


def test_wilsons_interval():
    """9 of 10: [0.5958, 0.9821] (Wilson 1927, z = 1.96)."""
    task = Task("needle", (), "", "", (), 0.0, ())
    trials = [Trial(task, 1, 0.5, "", i > 0) for i in range(10)]
    got = share(trials)
    assert got.value == 0.9 and abs(got.low - 0.5958) < 1e-3 and abs(got.high - 0.9821) < 1e-3
    assert share([]).samples == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--lengths", "64k"], 4, "64,000 tokens are more than the 32,768"),
        (["--text", "nowhere"], 3, "no such file or directory: nowhere"),
        (["--lengths", "1,64"], 3, "--lengths begins at 2"),
        (
            ["--lengths", "20k,30k"],
            3,
            "too short to measure anything at 20,000 or 30,000; shorter --lengths, or more --text",
        ),
        (["--task", "neddle"], 2, "neddle"),
        (["--attention", "h20"], 2, "h20"),
        (["--task", "short", "--attention", "ask"], 2, "--attention ask needs a --task that is asked of a text"),
        (["--task", "perplexity", "--heat-map", "map.png"], 2, "--heat-map needs a --task with depths"),
    ],
)
def test_mistakes(nsa, text, arguments, code, words):
    run = nsa("eval", "--text", text, *arguments)
    assert run.code == code and words in run.err and "Traceback" not in run.err


def test_no_text_at_all(nsa, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"path": "a", "text": " "}\n')
    run = nsa("eval", "--text", tmp_path / "blank.jsonl")
    assert run.code == 3 and "no text to read" in run.err and "Traceback" not in run.err


@pytest.mark.parametrize("task", ["perplexity", "needle", "defines"])
def test_a_text_that_is_too_short(nsa, text, task):
    """A row of 8,000 tokens that were asked of a few hundred would be none of 8,000."""
    run = nsa("eval", "--text", text / "part0.py", "--lengths", "300,8000", "--task", task, "--depths", "1")
    assert run.code == 0 and "8,000" not in run.out and re.search(rf"{task} +300 ", run.out), run.out
    assert re.search(rf"the texts have [\d,]+ tokens: no {task} beyond", run.err), run.err


def test_nothing_to_draw(nsa, text, tmp_path):
    """No function of one line raises: the row says so, and there is no heat map of it."""
    drawn = tmp_path / "map.png"
    run = nsa("eval", "--text", text, "--lengths", "900", "--task", "raises", "--heat-map", drawn)
    assert run.code == 0 and "none in the text" in run.out and not drawn.exists()
    assert "no heat map: nothing was asked of raises" in run.err and "Traceback" not in run.err
