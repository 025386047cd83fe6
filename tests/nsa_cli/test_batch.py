"""`nsa batch`: records, their order, what is read once, errors as records, and going on after a kill."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa_models.engine
from nsa_cli.batch import run_batch
from nsa_cli.jobs import groups, parse_jobs
from nsa_cli.records import RecordFile, RecordStream
from nsa_models.errors import BatchError

NSA = [sys.executable, "-m", "nsa_cli"]
SHORT = ("--max-tokens", 8)
WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "runs", "away", "other", "animals", "old", "forest"]


def lines_of(*jobs: dict) -> str:
    return "".join(json.dumps(job) + "\n" for job in jobs)


def records_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def text(seed: int, lines: int = 12) -> str:
    words = random.Random(seed)
    return "".join(" ".join(words.choices(WORDS, k=9)) + "\n" for _ in range(lines))


@pytest.fixture
def docs(tmp_path: Path, monkeypatch) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(text(i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jobs_about(documents: int, count: int) -> list[dict]:
    """Jobs that go round the documents, with questions of different lengths."""
    return [
        {
            "id": f"q{i}",
            "paths": [f"{i % documents}.txt"],
            "question": "who jumps over the dog?" + " and why?" * (i % 7),
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("cache", [[], ["--no-cache"]], ids=["store", "memory"])
def test_records_are_in_order_and_say_what_ask_says(nsa, docs, monkeypatch, cache):
    jobs = [*jobs_about(3, 7), {"id": 7, "text": "the lazy fox\n", "question": "who is lazy?"}]
    prefilled = []
    prefill = nsa_models.engine.prefill

    def counted(model, ids, *args, **options):
        prefilled.append(len(ids))
        return prefill(model, ids, *args, **options)

    monkeypatch.setattr(nsa_models.engine, "prefill", counted)
    code, out, err = nsa("batch", "-", *SHORT, *cache, stdin=lines_of(*jobs))
    assert (code, err) == (0, "")
    records = records_of(out)
    assert [record["id"] for record in records] == [job["id"] for job in jobs]
    assert len([n for n in prefilled if n >= 64]) == 3  # every document once
    for job, record in zip(jobs, records, strict=True):
        (docs / "text").write_text(job.get("text", ""))
        alone = json.loads(nsa("ask", *job.get("paths", ["text"]), job["question"], *SHORT, "--json").out)
        assert record["answer"] == alone["answer"] and record["answer"]
        assert [e["lift"] for e in record["evidence"]] == [e["lift"] for e in alone["evidence"]]
        assert record["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
        assert record.keys() - {"id", "job"} == alone.keys()
    assert [record["usage"]["cached_tokens"] > 0 for record in records] == [False] * 3 + [True] * 4 + [False]


def test_errors_are_records_and_exit_code_7(nsa, docs):
    (docs / "image.bin").write_bytes(b"\0\1")
    good = {"id": "good", "paths": ["0.txt"], "question": "who?"}
    bad = [
        ('{"id": "torn", "paths"', "line 1: not JSON", None, 3),
        ("[1]", "line 2: not a JSON object", None, 3),
        ('{"question": "who?"}', "line 3: it needs an id", None, 3),
        ('{"id": true, "text": "a", "question": "b"}', "line 4: it needs an id", None, 3),
        ('{"id": "\\ud800", "text": "a", "question": "b"}', "line 5: not JSON", None, 3),
        ('{"id": "u", "txt": "a", "question": "b"}', "'txt'; did you mean 'text'?", "u", 3),
        ('{"id": "both", "text": "a", "paths": ["0.txt"], "question": "b"}', "either 'paths' or 'text'", "both", 3),
        ('{"id": "none", "question": "b"}', "either 'paths' or 'text'", "none", 3),
        ('{"id": "ask", "text": "a"}', "either 'question' or 'recipe'", "ask", 3),
        ('{"id": "string", "paths": "0.txt", "question": "b"}', "list of paths", "string", 3),
        ('{"id": "stdin", "paths": ["-"], "question": "b"}', "standard input", "stdin", 3),
        ('{"id": "blank", "text": "a", "question": " "}', "'question' must be", "blank", 3),
        ('{"id": "form", "text": "a", "recipe": "b", "schema": "c"}', "beside a 'question'", "form", 3),
        ('{"id": "form 2", "text": "a", "question": "b", "schema": 3}', "'schema' must be", "form 2", 3),
        ('{"id": "form 3", "text": "a", "question": "b", "schema": "a b c"}', "is not a field", "form 3", 3),
        ('{"id": "params", "text": "a", "question": "b", "params": {}}', "beside a 'recipe'", "params", 3),
        ('{"id": "gone", "paths": ["gone.txt"], "question": "b"}', "no such file or directory: gone.txt", "gone", 3),
        ('{"id": "bin", "paths": ["image.bin"], "question": "b"}', "image.bin: binary", "bin", 3),
        (json.dumps({"id": "long", "text": text(9, 90), "question": "b"}), "more than the", "long", 4),
        ("[" * 100_000, "not JSON", None, 3),
    ]
    lines = [line for line, *_ in bad] + [json.dumps(good), ""]
    code, out, err = nsa("batch", "-", *SHORT, "--max-context", 900, stdin="\n".join(lines))
    *failed, last = records_of(out)
    assert (
        code == 7 and err == f"nsa: {len(bad)} of {len(bad) + 1} jobs failed; the first, line 1: {message(failed[0])}\n"
    )
    for (_, says, id, exit_code), record in zip(bad, failed, strict=True):
        assert says in message(record), record
        assert (record["id"], record["error"]["exit_code"], "answer" in record) == (id, exit_code, False)
    assert last["id"] == "good" and last["answer"]


def test_a_job_may_ask_for_json(nsa, docs):
    form = {"enum": ["fox", "dog"]}
    jobs = [{"id": i, "paths": ["0.txt"], "question": "who?"} | more for i, more in enumerate([{}, {"schema": form}])]
    plain, formed = records_of(nsa("batch", "-", *SHORT, stdin=lines_of(*jobs)).out)
    assert "data" not in plain and formed["data"] in form["enum"] and json.loads(formed["answer"]) == formed["data"]
    assert formed["answer"] + "\n" == nsa("ask", "0.txt", "who?", "--schema", json.dumps(form), *SHORT).out
    cut = nsa("batch", "-", "--max-tokens", 2, stdin=lines_of(jobs[1] | {"schema": "name"}))
    assert cut.code == 7 and records_of(cut.out)[0]["error"]["exit_code"] == 6


def message(record: dict) -> str:
    return record["error"]["message"]


RECIPE = """
name: count
description: Count.
params: {what: {type: string, required: true, help: What to count.}}
sources: {exclude: ["1.txt"]}
generate: {max_tokens: 6}
steps: [{id: all, prompt: "How many {{ what }}?"}]
expect: {max_words: MOST}
"""


def test_recipes_run_as_nsa_run_does(nsa, docs):
    Path("in").mkdir()
    for name in ("0.txt", "1.txt"):
        Path(name).rename(f"in/{name}")
    Path("count.yaml").write_text(RECIPE.replace("MOST", "99"))
    jobs = [
        {"id": "a", "paths": ["in"], "recipe": "./count.yaml", "params": {"what": "dogs"}},
        {"id": "b", "paths": ["in"], "recipe": "./count.yaml", "params": {"whom": "dogs"}},
        {"id": "c", "paths": ["in"], "recipe": "no-such-recipe"},
        {"id": "d", "paths": ["in"], "question": "How many dogs?"},
    ]
    Path("jobs.jsonl").write_text(lines_of(*jobs))
    arguments = ("batch", "jobs.jsonl", "-o", "out", "--reproducible")
    run = nsa(*arguments)
    ran, unknown, missing, asked = records_of(Path("out").read_text())
    alone = json.loads(nsa("run", "./count.yaml", "in", "--what", "dogs", "--json").out)
    assert {key: ran[key] for key in ("answer", "recipe", "parts", "evidence")} == {
        key: alone[key] for key in ("answer", "recipe", "parts", "evidence")
    }
    assert run.code == 7 and "'whom'" in message(unknown) and "no recipe 'no-such-recipe'" in message(missing)
    assert asked["usage"]["completion_tokens"] > ran["usage"]["completion_tokens"] == 6
    Path("count.yaml").write_text(RECIPE.replace("MOST", "0"))
    run = nsa(*arguments)
    assert run.code == 3 and "another version of job" in run.err
    run = nsa(*arguments, "--restart", "--max-tokens", 7)
    ran = records_of(Path("out").read_text())[0]
    assert "at most 0 expected" in message(ran) and ran["error"]["exit_code"] == 6
    assert ran["answer"] and ran["usage"]["completion_tokens"] == 7  # a flag outranks the recipe


def test_fail_fast_stops_at_the_first_error(nsa, docs):
    jobs = jobs_about(2, 4)
    jobs[1]["paths"] = ["gone.txt"]
    code, out, err = nsa("batch", "-", *SHORT, "--fail-fast", stdin=lines_of(*jobs))
    assert code == 7 and "1 of 4 jobs failed" in err
    assert [record["id"] for record in records_of(out)] == ["q0", "q1", "q2"]  # q0 and q2 share a document


def test_what_is_refused_before_anything_runs(nsa, docs, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(lines_of(*jobs_about(1, 2)))
    (tmp_path / "link").symlink_to(jobs)
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "notes.jsonl").write_text('{"id": "x", "answer": "of other jobs"}\n')
    for args, code, says in (
        (["jobs.jsonl", "-o", "jobs.jsonl"], 3, "would be overwritten by its own answers"),
        (["jobs.jsonl", "-o", "link"], 3, "would be overwritten by its own answers"),
        (["jobs.jsonl", "-o", "notes.txt"], 3, "notes.txt holds no records"),
        (["jobs.jsonl", "-o", "notes.jsonl"], 3, 'answers a job "x" that is not here'),
        (["gone.jsonl"], 3, "gone.jsonl: no such file"),
        (["0.txt", "-m", "no-such-model"], 5, "no-such-model"),
        (["jobs.jsonl", "-o", "no/such/folder"], 1, "No such file or directory"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        run = nsa("batch", *args)
        assert (run.code, run.out) == (code, "") and says in run.err and run.err.count("\n") == 1, run
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    twice = nsa("batch", "-", stdin=lines_of(*jobs_about(1, 2), *jobs_about(1, 1)))
    assert twice == (3, "", 'nsa: line 3: id "q0" is that of line 1; ids must differ\n')
    assert nsa("batch", "-", stdin=" \n").code == 3


def test_a_file_of_answers_is_kept_and_errors_are_tried_again(nsa, docs):
    jobs = jobs_about(2, 5)
    jobs[1]["paths"] = ["later.txt"]
    jobs[3]["paths"] = ["later.txt"]
    (docs / "jobs.jsonl").write_text(lines_of(*jobs))
    run = nsa("batch", "jobs.jsonl", "-o", "out.jsonl", *SHORT)
    first = records_of((docs / "out.jsonl").read_text())
    assert run.code == 7 and run.out == ""
    assert [("error" in record, record["id"]) for record in first] == [(i in (1, 3), f"q{i}") for i in range(5)]
    (docs / "later.txt").write_text(text(7))
    run = nsa("batch", "jobs.jsonl", "-o", "out.jsonl", *SHORT)
    assert (run.code, run.err) == (0, "nsa: 3 of 5 jobs are answered already\n")
    second = records_of((docs / "out.jsonl").read_text())
    assert [record["id"] for record in second] == [f"q{i}" for i in range(5)]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True, False, True]  # timings too
    assert nsa("batch", "jobs.jsonl", "-o", "out.jsonl", *SHORT, "--no-cache").code == 0  # that changes no answer
    changed = nsa("batch", "jobs.jsonl", "-o", "out.jsonl", "--max-tokens", 9)
    assert changed.code == 3 and 'another version of job "q0"' in changed.err
    assert records_of((docs / "out.jsonl").read_text()) == second
    assert nsa("batch", "jobs.jsonl", "-o", "out.jsonl", "--max-tokens", 9, "--restart").code == 0
    assert {r["usage"]["completion_tokens"] for r in records_of((docs / "out.jsonl").read_text())} == {9}


def test_two_runs_do_not_write_to_one_file(nsa, docs):
    (docs / "jobs.jsonl").write_text(lines_of(*jobs_about(1, 1)))
    other = RecordFile(docs / "out.jsonl", {})
    run = nsa("batch", "jobs.jsonl", "-o", "out.jsonl", *SHORT)
    assert run.code == 3 and "another nsa batch is writing" in run.err
    other.close()
    assert nsa("batch", "jobs.jsonl", "-o", "out.jsonl", *SHORT).code == 0


def test_no_regular_file_is_written_to_as_it_is(nsa, docs):
    assert nsa("batch", "-", "-o", os.devnull, *SHORT, stdin=lines_of(*jobs_about(1, 1))) == (0, "", "")
    assert Path(os.devnull).is_char_device()


ids = st.one_of(st.integers(), st.text(max_size=5).filter(lambda t: t.isprintable()))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_run_killed_anywhere_and_resumed_writes_what_an_undisturbed_one_does(data):
    """Killed by cutting the file at any byte; the engine is one that answers at once, in its own order."""
    names = data.draw(st.lists(ids, unique_by=lambda i: (str(type(i)), i), min_size=1, max_size=8))
    jobs = parse_jobs(
        lines_of(
            *({"id": n, "text": f"d{data.draw(st.integers(0, 2))}", "question": "q\u2028é"} for n in names)
        ).encode()
    )
    failing = data.draw(st.sets(st.sampled_from([job.key for job in jobs])))
    digests = {job.key: str(i) for i, job in enumerate(jobs)}
    ran: list[str] = []

    def engine(grouped):
        for job in (job for group in grouped for job in group):
            ran.append(job.key)
            outcome = "error" if job.key in failing else "answer"
            yield job, {"id": job.id, outcome: {"message": job.text * 3}}

    with tempfile.TemporaryDirectory() as folder:
        calm, torn = Path(folder) / "calm", Path(folder) / "torn"
        whole = finish(jobs, engine, RecordFile(calm, digests))
        order = [job for group in groups(jobs) for job in group]
        lines = dict(zip(digests, calm.read_bytes().splitlines(keepends=True), strict=True))
        written = b"".join(lines[job.key] for job in order)  # as it stands before it is put into order
        for cut in sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=3))):
            torn.write_bytes(written[:cut])
            ran.clear()
            again = finish(jobs, engine, RecordFile(torn, digests))
            assert torn.read_bytes() == calm.read_bytes() and again == whole
            complete = [job.key for job in order][: written[:cut].count(b"\n")]
            assert ran == [job.key for job in order if job.key not in complete or job.key in failing]


def finish(jobs, engine, records) -> str:
    try:
        run_batch(jobs, engine, records, keep_going=True)
    except BatchError as error:
        return str(error)
    finally:
        records.close()
    return ""


@given(st.permutations(range(6)), st.integers(0, 6))
def test_a_stream_keeps_the_order_and_writes_as_soon_as_it_can(order, count):
    out = io.StringIO()
    stream = RecordStream({str(i): "" for i in range(6)}, out)
    for i in order[:count]:
        stream.add(str(i), {"id": i})
        done = set(order[: order.index(i) + 1])
        assert [record["id"] for record in records_of(out.getvalue())] == list(
            range(next(n for n in range(7) if n not in done))
        )
    stream.close()
    assert [record["id"] for record in records_of(out.getvalue())] == sorted(order[:count])


def test_1000_jobs_killed_five_times_at_random_are_resumed_byte_for_byte(nsa, docs, monkeypatch):
    for i in range(20):
        Path(f"{i}.txt").write_text(text(i, lines=4))
    jobs = jobs_about(20, 1000)
    jobs[500]["paths"] = ["gone.txt"]
    Path("jobs.jsonl").write_text(lines_of(*jobs))
    options = ["--reproducible", "--max-tokens", "2"]
    assert nsa("batch", "jobs.jsonl", "-o", "calm", *options).code == 7
    monkeypatch.setenv("NSA_CACHE_DIR", "store-of-the-killed")
    seen = [0]

    def records() -> int:
        return Path("killed").read_bytes().count(b"\n") if Path("killed").exists() else 0

    for _ in range(5):
        more = random.randint(1, 150)
        with subprocess.Popen([*NSA, "batch", "jobs.jsonl", "-o", "killed", *options], stderr=-1) as process:
            while records() < seen[-1] + more and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        seen.append(records())
    assert sorted(set(seen)) == seen and seen[-1] < 1000  # each did some and none did all
    assert nsa("batch", "jobs.jsonl", "-o", "killed", *options).code == 7
    assert Path("killed").read_bytes() == Path("calm").read_bytes()
    found = records_of(Path("calm").read_text())
    assert [record["id"] for record in found] == [job["id"] for job in jobs]
    assert [record["id"] for record in found if "error" in record] == ["q500"]
