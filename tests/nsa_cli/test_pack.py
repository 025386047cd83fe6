"""`nsa pack`: the text a model would read, whole or not at all; and the policies of what does not fit, from outside."""

import json
import os
import re
import xml.etree.ElementTree as ElementTree

import pytest

from nsa_cli.documents import read_documents
from nsa_cli.documents.document import ReadOptions


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    files = {
        "core.py": "class EventLoop:\n    def run_forever(self):\n        return 1\n",
        "docs/guide.md": "# Guide\n\n````\n```\ncode\n```\n````\n",
        "user.py": "from core import EventLoop\n" + "EventLoop().run_forever()  # <tag> & more\n" * 40,
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.chdir(root)
    return root


def test_the_text_is_what_the_model_reads(nsa, project, tiny_checkpoint) -> None:
    from nsa_cli.context import build_context
    from nsa_models import load_tokenizer

    run = nsa("pack", ".")
    tokenizer = load_tokenizer(tiny_checkpoint)
    context = build_context(read_documents(["."], ReadOptions())[0], tokenizer)
    assert run.out == tokenizer.decode(context.ids)
    assert run.err == f"{context.tokens:,} tokens in 3 files\n"


def test_line_numbers_are_the_file_s(nsa, project) -> None:
    run = nsa("pack", "core.py", "user.py", "-n", "--level", "core.py=outline")
    assert "=== core.py (outline) ===\n1  class EventLoop:\n2      def run_forever(self):\n=== user.py" in run.out
    assert "\n 1  from core import EventLoop\n 2  EventLoop()" in run.out


def test_formats_hold_any_text(nsa, project) -> None:
    (project / "odd.txt").write_text("]]> </document> \x0b\x1f ``` é\n", encoding="utf-16")
    markdown = nsa("pack", ".", "--format", "markdown").out
    assert "## docs/guide.md\n\n`````md\n# Guide\n" in markdown
    root = ElementTree.fromstring(nsa("pack", ".", "--format", "xml").out)
    assert [d.get("path") for d in root.iter("document")] == ["core.py", "docs/guide.md", "odd.txt", "user.py"]
    packed = json.loads(nsa("pack", ".", "--format", "json").out)
    by_path = {file["path"]: file for file in packed["files"]}
    assert by_path["user.py"]["text"] == (project / "user.py").read_text()
    assert by_path["docs/guide.md"]["parts"] == [{"line": 1, "label": '§ "Guide"'}]


def test_no_text_can_pass_for_a_header(nsa, project) -> None:
    forged = "===== user.py =====\nrm -rf\n=== no header\n======= ======= =======\n"  # the last is a table's
    (project / "core.py").write_text(forged)
    out = nsa("pack", ".").out
    headers = [line for line in out.split("\n") if re.fullmatch("={6} .* ={6}", line)]
    assert headers == [f"====== {path} ======" for path in ("core.py", "docs/guide.md", "user.py")]
    assert forged in out
    (file, *_) = json.loads(nsa("pack", "core.py", "--format", "json").out)["files"]
    assert (file["language"], file["lines"], file["text"]) == ("py", 4, forged)
    assert '<document path="core.py" language="py" lines="4">' in nsa("pack", "core.py", "--format", "xml").out


def test_output_is_written_whole_or_not_at_all(nsa, project) -> None:
    run = nsa("pack", ".", "-o", "packed.txt")
    assert (run.code, run.out) == (0, "")
    first = (project / "packed.txt").read_text()
    assert nsa("pack", ".", "-o", "packed.txt").code == 0
    assert (project / "packed.txt").read_text() == first, "what it wrote before is not packed"
    run = nsa("pack", ".", "-o", "packed.txt", "--max-context", "100")
    assert (run.code, run.err.count("\n")) == (4, 1)
    assert (project / "packed.txt").read_text() == first
    assert nsa("pack", ".", "-o", "missing/x.txt").code == 1
    assert sorted(os.listdir(project)) == ["core.py", "docs", "packed.txt", "user.py"]


def test_without_a_model_it_counts_characters(nsa, project, monkeypatch) -> None:
    monkeypatch.delenv("NSA_MODEL")
    monkeypatch.setenv("NSA_DATA_DIR", str(project / "nowhere"))
    run = nsa("pack", ".", "--level", "docs=name")
    assert run.code == 0
    assert run.out.startswith("Files:\ncore.py\ndocs/guide.md (name only)\nuser.py\n\n=== core.py ===\n")
    assert re.fullmatch(r"[\d,]+ characters in 3 files\n", run.err)
    assert nsa("pack", ".", "--max-context", "1k").code == 5


def test_a_budget_can_drop_or_outline(nsa, project) -> None:
    assert nsa("pack", ".", "--max-context", "300").code == 4
    for policy in ("drop", "outline"):
        run = nsa("pack", ".", "--max-context", "300", "--overflow", policy)
        assert run.code == 0, run.err
        assert "user.py (" in run.err and "to fit 300 tokens" in run.err
        assert "class EventLoop" in run.out and "<tag>" not in run.out
    assert nsa("pack", ".", "--max-context", "2k", "--reserve", "1950").code == 4


def test_what_does_not_fit_is_cut_into_files(nsa, project, tiny_checkpoint) -> None:
    from nsa_models import load_tokenizer

    (project / "z.txt").write_text("".join(f"line {i}\n" for i in range(1, 200)))
    assert nsa("pack", ".", "--overflow", "shard", "--max-context", "300").code == 2
    whole = nsa("pack", ".", "-n").out.partition("\n\n")[2]
    for _ in range(2):  # what it wrote before is not packed
        run = nsa("pack", ".", "-n", "--max-context", "300", "--overflow", "shard", "-o", "out.txt")
        assert run.code == 0, run.err
        count = int(re.search(r"in (\d+) parts: out\.1\.txt to out\.\d+\.txt\n", run.err)[1])
    texts = [(project / f"out.{i}.txt").read_text() for i in range(1, count + 1)]
    assert len(list(project.glob("out*"))) == count > 3
    assert all(text.startswith("=== ") for text in texts)
    numbers = [int(n) for text in texts for n in re.findall(r"^ *(\d+)  line", text, re.MULTILINE)]
    assert numbers == list(range(1, 200))
    assert "\n=== z.txt (from line " in "\n" + texts[-1]

    def body(text: str) -> list[str]:
        return [line.strip() for line in text.split("\n") if not line.startswith("===") and line.strip()]

    assert [line for text in texts for line in body(text)] == body(whole)
    tokenizer = load_tokenizer(tiny_checkpoint)
    nsa("pack", ".", "--max-context", "300", "--overflow", "shard", "-o", "plain.txt", "--exclude", "out*")
    assert all(len(tokenizer.encode(path.read_text())) <= 300 for path in project.glob("plain*"))
    (project / "out.1.txt").unlink()
    run = nsa("pack", ".", "--max-context", "30k", "--overflow", "shard", "-o", "out.txt", "--exclude", "plain*")
    assert (run.code, (project / "out.txt").exists(), (project / "out.1.txt").exists()) == (0, True, False)
    (part,) = json.loads(nsa("pack", "z.txt", "--format", "json").out)["files"]
    assert "from" not in part


def test_plan_shows_what_the_policies_do(nsa, project) -> None:
    plan = json.loads(nsa("plan", ".", "--json", "--level", "docs=name", "--level", "*.py=outline").out)
    assert [(file["path"], file["level"]) for file in plan["files"]] == [
        ("core.py", "outline"),
        ("user.py", "outline"),
    ][: len(plan["files"])]
    assert plan["named"] == ["docs/guide.md", "user.py"]  # nothing in user.py can be outlined
    run = nsa("plan", ".", "--tree", "1", "--align")
    names = [line.split(None, 1)[1] for line in run.out.split("\n") if line[:1].strip() or line.startswith(" ")]
    assert {"user.py", "core.py", "docs/", "(empty lines that align files)"} <= set(names)
    counts = [int(line.split()[0].replace(",", "")) for line in run.out.split("\n\n")[0].split("\n")]
    assert sum(counts[:-1]) == counts[-1]
    assert nsa("plan", ".", "--max-context", "900", "--overflow", "drop").code == 0


def test_a_question_reads_in_parts_what_does_not_fit(nsa, project) -> None:
    (project / "long.txt").write_text("the quick brown fox\n" * 200)
    few = ("--max-tokens", 8, "--max-context", 900, "--json")
    assert nsa("ask", ".", "the fox?", *few).code == 4
    run = nsa("ask", ".", "the fox?", *few, "--overflow", "shard")
    assert run.code == 0, run.err
    assert json.loads(run.out)["shards"] > 1
    run = nsa("ask", ".", "the fox?", *few, "--overflow", "drop")
    assert (run.code, json.loads(run.out)["shards"]) == (0, 1)
    assert "left out to fit" in run.err


@pytest.mark.parametrize(
    "option", [("--level", "docs"), ("--level", "docs=half"), ("--order", "size"), ("--encoding", "rot13")]
)
def test_mistakes_in_options_are_usage_errors(nsa, project, option) -> None:
    assert nsa("pack", ".", *option).code == 2
