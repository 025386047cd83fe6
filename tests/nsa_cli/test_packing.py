"""Order, detail, and what goes where documents do not fit."""

import os
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_cli.context import Grid, Place
from nsa_cli.documents import Document, read_documents
from nsa_cli.documents.bare import bare
from nsa_cli.documents.document import Part, ReadOptions
from nsa_cli.documents.outline import outline
from nsa_cli.documents.tags import LANGUAGES, find_tags
from nsa_cli.importance import importance, page_rank
from nsa_cli.order import in_order, priorities
from nsa_cli.packing import Packing, pack_documents


class Letters:
    """A tokenizer with a token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode(text), list(range(len(text)))


LETTERS = Letters()
CORE = "class EventLoop:\n    def run_forever(self):\n        return 1\n\n\ndef helper():\n    pass\n"
USER = "from core import EventLoop\n\n\ndef start():\n    EventLoop().run_forever()\n"
OTHER = "from core import EventLoop\n\nloop = EventLoop()\n"
FILES = [
    Document("core.py", CORE),
    Document("other.py", OTHER),
    Document("user.py", USER),
    Document("zz.txt", "notes\n"),
]


def text_of(context) -> str:
    return "".join(map(chr, context.ids))


def shown(context) -> list[str]:
    return [file.path for file in context.files]


SOURCES = {
    ".py": ("class Alpha:\n    def beta(self):\n        return gamma()\n", {1: "Alpha", 2: "beta"}, "gamma"),
    ".js": ("class Alpha {\n  beta() {\n    return gamma();\n  }\n}\n", {1: "Alpha", 2: "beta"}, "gamma"),
    ".ts": ("class Alpha {\n  beta(): number {\n    return gamma();\n  }\n}\n", {1: "Alpha", 2: "beta"}, "gamma"),
    ".tsx": ("function Alpha() {\n  return gamma();\n}\n", {1: "Alpha"}, "gamma"),
    ".go": ("package a\n\nfunc Alpha() int {\n\treturn gamma()\n}\n", {3: "Alpha"}, "gamma"),
    ".rs": ("struct Alpha;\nfn beta() {\n    gamma();\n}\n", {1: "Alpha", 2: "beta"}, "gamma"),
    ".java": ("class Alpha {\n  int beta() {\n    return gamma();\n  }\n}\n", {1: "Alpha", 2: "beta"}, "gamma"),
    ".c": ("int alpha(int x)\n{\n  return gamma(x);\n}\n", {1: "alpha"}, None),
    ".cpp": ("class Alpha {\n  int beta() { return 1; }\n};\n", {1: "Alpha", 2: "beta"}, None),
    ".rb": ("class Alpha\n  def beta\n    gamma(1)\n  end\nend\n", {1: "Alpha", 2: "beta"}, "gamma"),
    ".php": ("<?php\nfunction alpha() {\n  gamma();\n}\n", {2: "alpha"}, None),
}


@pytest.mark.parametrize("suffix", SOURCES)
def test_definitions_and_references_are_found(suffix: str) -> None:
    source, definitions, reference = SOURCES[suffix]
    tags = find_tags(source, "a" + suffix)
    assert definitions.items() <= {t.first_line: t.name for t in tags if t.is_definition}.items()
    assert reference is None or reference in {t.name for t in tags if not t.is_definition}
    found = outline(Document("a" + suffix, source))
    assert set(definitions) <= set(found.lines)
    assert "gamma" not in found.text


def test_every_grammar_works() -> None:
    for suffix in LANGUAGES:
        find_tags("x", "a" + suffix)
    assert find_tags("x", "a.unknown") == []


def test_outlines_keep_the_lines_of_the_file() -> None:
    found = outline(FILES[0])
    assert found.text == "class EventLoop:\n    def run_forever(self):\ndef helper():\n"
    assert found.lines == (1, 2, 6)
    markdown = Document("a.md", "# A\ntext\n\n## B\n", (Part(1, '§ "A"'), Part(4, '§ "B"')))
    assert outline(markdown).text == "# A\n## B\n"
    assert outline(Document("t.csv", "a,b\n1,2\n")).text == "a,b\n"
    assert outline(Document("x.txt", "notes\n")) is None
    context = pack_documents([FILES[0]], [], LETTERS, Packing(levels=(("*.py", "outline"),)), 9999)
    assert text_of(context).startswith("=== core.py (outline) ===\nclass EventLoop:\n")
    assert context.locate(context.tokens - 3, context.tokens) == [Place("core.py", 6, 6)]


PYTHON = [
    "def f(a,\n      b):",
    "    x = 1",
    "class C:",
    "",
    "    def m(self): pass",
    "f()",
    "# no é",
    "y = 2 # why",
    "  ",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PYTHON)), st.sampled_from([outline, bare]))
def test_every_token_of_some_lines_maps_to_the_line_that_holds_it(lines: list[str], shorten) -> None:
    text = "\n".join(lines) + "\n"
    found = shorten(Document("a.py", text))
    if not found or found.level == "name":
        return
    context = pack_documents([found], [], LETTERS, Packing(), 99999)
    (file,) = context.files
    row = 0
    for token, character in enumerate(file.text, file.start + len(file.header)):
        (place,) = context.locate(token, token + 1)
        assert place.first_line == place.last_line
        line = text.split("\n")[place.first_line - 1]
        assert file.text.split("\n")[row] in (line, line.partition(" # ")[0].rstrip())
        row += character == "\n"


def test_importance_is_what_others_lean_on() -> None:
    ranks = importance(FILES)
    assert max(ranks) == ranks[0]
    assert sum(ranks) == pytest.approx(1)
    assert [d.path for d in in_order(FILES, "importance")][-1] == "core.py"
    assert importance([Document("a.txt", "x"), Document("b.txt", "y")]) == pytest.approx([0.5, 0.5])
    # Two pages that link to a third, which links to the first: the known solution of the equations.
    a, b, c = page_rank([{2: 1}, {2: 1}, {0: 1}])
    assert (a, b) == (pytest.approx(0.05 + 0.85 * c, abs=1e-6), pytest.approx(0.05, abs=1e-6))


def test_readmes_come_first_and_paths_as_they_are() -> None:
    documents = [Document(path, "x") for path in ("a/README.md", "a/b.py", "README.md", "b.py")]
    assert [d.path for d in in_order(documents, "readme")] == ["README.md", "a/README.md", "b.py", "a/b.py"]
    assert in_order(documents, "path") == documents
    assert max(zip(priorities(documents, "path"), range(4), strict=True))[1] == 2


@pytest.fixture
def history(tmp_path):
    """b.py changed three times, the last time long ago; a.py and the file with an odd name once, later."""

    def git(*arguments: str, date: str = "2020-01-01T00:00:00Z") -> None:
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        subprocess.run(
            ["git", "-C", tmp_path, *arguments], check=True, capture_output=True, env=os.environ | dates | names
        )

    git("init", "-q")
    for version in range(3):
        (tmp_path / "b.py").write_text(f"b = {version}\n")
        git("add", "b.py")
        git("commit", "-qm", f"change b {version}", date=f"2020-01-0{version + 1}T00:00:00Z")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "né\n.py").write_text("c = 1\n")
    git("add", ".")
    git("commit", "-qm", "add a", date="2021-01-01T00:00:00Z")
    return tmp_path


def test_recency_and_churn_come_from_git(history) -> None:
    (history / "new.py").write_text("n = 1\n")
    documents, _ = read_documents([str(history)], ReadOptions())
    odd = "né\ufffd.py"
    assert [d.path for d in in_order(documents, "churn")] == ["new.py", "a.py", odd, "b.py"]
    assert [d.path for d in in_order(documents, "recency")] == ["b.py", "a.py", odd, "new.py"]
    (history / "b.py").write_text("b = 9\n")
    os.utime(history / "new.py", (1, 1))
    documents, _ = read_documents([str(history)], ReadOptions())
    assert [d.path for d in in_order(documents, "recency")] == ["new.py", "a.py", odd, "b.py"]


def test_levels_by_pattern_the_first_match_counts() -> None:
    levels = (("core.py", "full"), ("*.py", "outline"), ("zz*", "name"))
    context = pack_documents(FILES, [], LETTERS, Packing(levels=levels), 9999)
    text = text_of(context)
    assert text.startswith(
        "Files:\ncore.py\nother.py (outline)\nuser.py (outline)\nzz.txt (name only)\n\n=== core.py ===\nclass"
    )
    assert "=== user.py (outline) ===\ndef start():\n" in text
    assert "notes" not in text


COMMENTED = {
    "a.py": ("# head\n\nx = '# no é comment'  # tail\n\n\ndef f():\n    # why\n    return 1\n", [3, 6, 8]),
    "a.c": ('/* one\n * two */ int a; // three\n\nchar *s = "/* no */";\n', [2, 4]),
    "a.rs": ("/// doc\n//! inner\nfn f() { /* in */ }\n", [3]),
    "A.java": ("/** doc */\nclass A { // a\n\n int x;\n}\n", [2, 4, 5]),
    "a.rb": ("# a\nputs 1 # b\n", [2]),
    "a.go": ("// a\npackage a\n", [2]),
    "a.ts": ("// a\nlet x: number = 1 /* b */\n", [2]),
    "a.php": ("<?php\n// a\n# b\necho 1;\n", [1, 4]),
}


@pytest.mark.parametrize("path", COMMENTED)
def test_code_is_what_is_no_comment(path) -> None:
    text, lines = COMMENTED[path]
    (document,) = pack_documents([Document(path, text)], [], LETTERS, Packing(levels=(("*", "code"),)), 9999).documents
    assert (document.level, document.lines) == ("code", tuple(lines))
    kept = document.text.split("\n")
    for number, line in zip(lines, kept, strict=False):
        assert set(line.split()) <= set(text.split("\n")[number - 1].split())
    assert "comment" not in document.text or "'# no é comment'" in document.text
    assert not any(word in document.text for word in ("head", "tail", "why", "two", "three", "doc", "inner", "in */"))


def test_code_of_other_files_is_all_of_them() -> None:
    documents = [Document("a.md", "# x\n\ny\n"), Document("b.py", "# only this\n"), Document("c.py", "x = 1\n")]
    context = pack_documents(documents, [], LETTERS, Packing(levels=(("*", "code"),)), 9999)
    assert text_of(context).startswith("Files:\na.md\nb.py (name only)\nc.py (code)\n\n=== a.md ===\n# x\n\ny\n")
    (place,) = context.locate(context.files[1].start, context.tokens)
    assert (place.path, place.first_line) == ("c.py", 1)


def test_what_the_user_puts_first_comes_last_and_is_kept(capsys) -> None:
    packing = Packing(prefer=("zz*", "/user.py"))
    context = pack_documents(FILES, [], LETTERS, packing, 9999)
    assert [file.path for file in context.files] == ["core.py", "other.py", "user.py", "zz.txt"]
    context = pack_documents(FILES, [], LETTERS, Packing(prefer=("/core.py",)), 9999)
    assert [file.path for file in context.files] == ["other.py", "user.py", "zz.txt", "core.py"]
    for order in ("path", "readme", "importance"):
        packed = pack_documents(FILES, [], LETTERS, Packing(order, ("zz*", "other.py"), overflow="drop"), 120)
        assert [file.path for file in packed.files] == ["other.py", "zz.txt"]
    assert "left out" in capsys.readouterr().err


def test_dropping_keeps_what_matters_and_names_the_rest(capsys) -> None:
    whole = pack_documents(FILES, [], LETTERS, Packing(), 9999)
    room = whole.tokens - 60
    context = pack_documents(FILES, [], LETTERS, Packing(overflow="drop"), room)
    assert context.tokens == len(context.ids) <= room
    gone = set(shown(whole)) - set(shown(context))
    assert gone and "core.py" not in gone
    assert shown(context) == [path for path in shown(whole) if path not in gone]
    assert {skip.path for skip in context.skips} == gone
    error = capsys.readouterr().err
    assert all(f"{path} (" in error for path in gone)
    assert (
        pack_documents(FILES, [], LETTERS, Packing(overflow="drop"), 5).tokens == whole.tokens
    )  # nothing would be left


def test_names_go_where_they_leave_no_room_for_a_file(capsys) -> None:
    names = [Document(f"some/folder/{i}.txt", "x\n") for i in range(40)]
    packing = Packing(levels=(("some", "name"),), overflow="drop")
    context = pack_documents([*FILES, *names], [], LETTERS, packing, 400)
    assert context.tokens <= 400 and {file.path for file in context.files} >= {"core.py", "zz.txt"}
    assert "some/ (40 files, 0)" in capsys.readouterr().err
    context = pack_documents([*FILES, *names], [], LETTERS, packing, 1500)
    assert len(context.documents) > 40 and context.files


def test_outlining_spares_what_matters(capsys) -> None:
    long = [Document(f"m{i}.py", f"def f{i}():\n" + "    call_the_core()\n" * 20) for i in range(5)]
    documents = [*long, Document("core.py", "def call_the_core():\n" + "    pass\n" * 30)]
    whole = pack_documents(documents, [], LETTERS, Packing(), 99999)
    context = pack_documents(documents, [], LETTERS, Packing(overflow="outline"), whole.tokens - 500)
    assert context.tokens == len(context.ids) <= whole.tokens - 500
    levels = {file.path: file.document.level for file in context.files}
    assert levels["core.py"] == "full"
    outlined = [path for path, level in levels.items() if level == "outline"]
    assert 0 < len(outlined) < 5
    assert all(f"{path} (" in capsys.readouterr().err for path in outlined[:1])


def test_what_is_gone_is_named_by_whole_directories(capsys) -> None:
    paths = ["a.py", "docs/a.txt", "docs/b/c.txt", "src/a.py", "src/b.py"]
    documents = [Document(path, "x = 1\n" * (1 if path == "src/a.py" else 20)) for path in paths]
    context = pack_documents(documents, [], LETTERS, Packing(overflow="drop"), 60)
    assert shown(context) == ["src/a.py"]
    assert "left out to fit 60 tokens: a.py (133), docs/ (2 files, 280), src/b.py (137)\n" in capsys.readouterr().err
    many = [Document(f"d/{i:04}.py", "x = 1\n") for i in range(500)]  # whose names alone are too long
    context = pack_documents(many, [], LETTERS, Packing(overflow="drop"), 200)
    assert len(context.files) >= 3 and context.tokens <= 200


TEXTS = st.text("ab \n", min_size=1, max_size=80).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(TEXTS, min_size=1, max_size=6), st.integers(40, 700), st.sampled_from(["drop", "outline"]), st.booleans()
)
def test_what_is_packed_fits_and_is_what_the_counts_say(texts, room: int, overflow: str, align: bool) -> None:
    documents = [Document(f"f{i}.py", text) for i, text in enumerate(texts)]
    grid = Grid(16, 5)
    context = pack_documents(documents, [], LETTERS, Packing(overflow=overflow, align=align), room, grid)
    whole = pack_documents(documents, [], LETTERS, Packing(align=align), room, grid)
    assert context.tokens == len(context.ids) <= whole.tokens
    if overflow == "drop" and context.tokens > room:
        assert context.tokens == whole.tokens
    if align:
        assert all((file.start + 5) % 16 == 0 for file in context.files if file.start)
        for before, after in zip(context.files, context.files[1:], strict=False):
            assert set(context.ids[before.stop : after.start]) <= {ord("\n")}
            assert context.locate(before.stop, after.start) == []
    for file in context.files:
        assert text_of(context)[file.start : file.stop].startswith(f"=== {file.path}")
    for shard in whole.split(60):
        assert len(shard.ids) == shard.tokens <= 60
