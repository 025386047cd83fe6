"""`nsa plan`: exact counts, exit codes, and no torch."""

import json
import os
import subprocess
import sys

import pytest

from nsa_cli.context import build_context
from nsa_cli.documents import Document
from nsa_models import load_tokenizer


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "project"
    for path, text in {"a.py": "x = 1\n", "tests/b.py": "the quick fox\n" * 200, "c.bin": "\0"}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_counts_are_those_of_the_context(nsa, tree, tiny_checkpoint) -> None:
    run = nsa("plan", tree, "--json")
    plan = json.loads(run.out)
    documents = [Document(path, (tree / path).read_text()) for path in ("a.py", "tests/b.py")]
    context = build_context(documents, load_tokenizer(tiny_checkpoint))
    assert run.code == 0
    assert plan["files"] == [{"path": f.path, "tokens": f.tokens, "level": "full"} for f in context.files]
    assert plan["tokens"] == len(context.ids)
    assert plan["skipped"] == [{"path": "c.bin", "reason": "binary"}]
    assert plan["fits"] is True
    assert plan["tokens"] < plan["room"] < 32768
    assert plan["memory_bytes"] > 0
    least, most = plan["prefill_seconds"]
    assert 0 <= least <= most and plan["measured"] is False
    assert plan["model"] == "tiny"


def test_table_has_the_largest_first_and_every_skip(nsa, tree) -> None:
    run = nsa("plan", tree)
    rows = [line.split() for line in run.out.splitlines() if line]
    assert [row[1] for row in rows[:2]] == ["tests/b.py", "a.py"]
    counts = [int(row[0].replace(",", "")) for row in rows[:4]]
    assert sum(counts[:3]) == counts[3], "files and their list add up to the total"
    assert ["c.bin", "binary"] in rows
    assert "fits in" in run.out
    assert (run.code, run.err) == (0, "")


def test_what_does_not_fit_is_shown_and_exits_with_4(nsa, tree) -> None:
    for flags in (["--max-context", "1k"], ["--max-context", "1k", "--json"]):
        run = nsa("plan", tree, *flags)
        assert run.code == 4
        assert "tests/b.py" in run.out
        assert run.err.count("\n") == 1
        assert "more than the" in run.err
        assert "--exclude tests" in run.err
    assert json.loads(run.out)["fits"] is False
    assert nsa("plan", tree, "--max-context", "1k", "--exclude", "tests").code == 0


def test_the_model_s_own_limit_counts_too(nsa, tree) -> None:
    (tree / "tests/b.py").write_text("the quick fox\n" * 20000)
    assert nsa("plan", tree, "--max-context", "10M").code == 4


def test_text_can_be_piped_in(nsa) -> None:
    for arguments in ((), ("-",)):
        run = nsa("plan", *arguments, "--json", stdin="the fox")
        assert [file["path"] for file in json.loads(run.out)["files"]] == ["<stdin>"]


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["missing"], 3),
        (["."], 0),
        ([".", "--max-context", "many"], 2),
        ([".", "--max-file-size", "big"], 2),
        ([".", "--max-file-size", "1"], 3),
        ([".", "--include", "*.rs"], 3),
        ([".", "--model", "missing"], 5),
        ([".", "--max-context", "64"], 4),
    ],
)
def test_exit_codes(nsa, tree, monkeypatch, arguments, code) -> None:
    monkeypatch.chdir(tree)
    run = nsa("plan", *arguments)
    assert run.code == code
    assert "Traceback" not in run.err
    assert bool(run.err) == bool(code)


def test_document_options_reach_the_reader(nsa, tree, monkeypatch) -> None:
    (tree / ".gitignore").write_text("ignored\n")
    for name in ("ignored", ".hidden", "yarn.lock"):
        (tree / name).write_text("x")
    (tree / "large").write_text("some text\n" * 300)

    def files(*options: str) -> list[str]:
        return [file["path"] for file in json.loads(nsa("plan", tree, "--json", *options).out)["files"]]

    everything = ["a.py", "large", "tests/b.py"]
    assert files() == everything
    assert files("--no-gitignore") == sorted([*everything, "ignored"])
    assert files("--hidden") == sorted([*everything, ".gitignore", ".hidden"])
    assert files("--no-default-ignores") == sorted([*everything, "yarn.lock"])
    assert files("--keep", "locks") == sorted([*everything, "yarn.lock"])
    (tree / ".nsaignore").write_text("large\n")
    assert (files(), files("--no-nsaignore")) == (["a.py", "tests/b.py"], everything)
    (tree / ".nsaignore").unlink()
    (tree / "t.csv").write_text("a,b\n" * 300)
    assert len(json.loads(nsa("plan", tree, "--json").out)["skipped"]) == 2
    assert len(json.loads(nsa("plan", tree, "--json", "--all-rows", "--encoding", "latin-1").out)["skipped"]) == 1
    (tree / "t.csv").unlink()
    assert files("--max-file-size", "2.9k") == ["a.py", "tests/b.py"]
    assert files("--include", "*.py", "--exclude", "/tests") == ["a.py"]


def test_plan_does_not_import_torch(tree, tiny_checkpoint, tmp_path) -> None:
    code = (
        "import sys\n"
        "from nsa_cli.cli import run\n"
        "code = run(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "plan", str(tree), "--model", str(tiny_checkpoint)]
    environment = {**os.environ, "PYTHONUTF8": "1", "NSA_CACHE_DIR": str(tmp_path / "store")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "fits in" in run.stdout
