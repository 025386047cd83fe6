"""Every built-in recipe: valid, commented key by key, and run over a real repository or book."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from nsa_cli.recipe import builtin_dir, load_recipe

RECIPES = sorted(path.stem for path in builtin_dir().glob("*.yaml"))
NAMES = """api-docs book-summary changelog chapter-summaries characters code-review dependency-map explain-repo
onboarding question-set security-review test-gaps timeline todo-triage"""
BRIEF = ("--max-tokens", 60, "--max-context", "20k")
WHOLE = ("--max-tokens", 6000, "--max-context", "30k")  # what the tiny checkpoint needs for a list of long strings
FILES = {
    "README.md": "# Ferry\n\nFerry plans boat trips between harbours. Run `ferry plan A B` to get a route.\n",
    "CONTRIBUTING.md": "Run `make test` before you send a change.\n",
    "pyproject.toml": '[project]\nname = "ferry"\n',
    "Makefile": "test:\n\tpytest\n",
    "src/route.py": '"""Routes."""\n\nimport heapq\nfrom ferry.tide import high_water\n\n\ndef shortest(graph, a, b):\n'
    '    """The shortest route from a to b."""\n    # TODO: mind the tide\n    return heapq.nsmallest(1, graph)\n',
    "src/login.py": "import hashlib\n\n\nclass Login:\n    def check(self, password):\n"
    "        return hashlib.md5(password.encode()).hexdigest()  # FIXME: salt it\n",
    "src/blank.py": "x = 1\n" * 30,
    "tests/test_route.py": "def test_shortest():\n    assert True  # TODO: more\n",
}
CHAPTER = "The harbour was closed because Ada Brill, the keeper, fell ill, and Jonas Weld wrote to the office. "
BOOK = f"""THE LAMP

CHAPTER I

{CHAPTER * 3}

It was the 3rd of May 1931.

CHAPTER II. The Letter

{CHAPTER * 4}

On Monday they opened it again.
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "ferry"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git = ["git", "-C", folder, "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Plan trips by the tide"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def book(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "lamp.txt").write_text(BOOK)
    monkeypatch.chdir(tmp_path)
    return "lamp.txt"


def run(nsa, name: str, *args, **options) -> dict:
    done = nsa("run", name, *args, "--json", **options)
    assert done.code == 0, done.err
    return json.loads(done.out)


def parts(reply: dict) -> list[str]:
    return [part["part"] for part in reply["parts"]]


def test_all_of_them_are_there():
    assert set(NAMES.split()) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_has_help_and_a_comment_for_every_key(nsa, name):
    recipe = load_recipe(name)
    assert recipe.name == name and len(recipe.description) < 90
    text = recipe.path.read_text("utf-8")
    assert f"nsa run {name}" in text.partition("name:")[0]
    above = ""
    for line in text.splitlines():
        top = re.match(r"(params|sources|context|system|generate|steps|expect):", line)
        inner = re.match(r"  (- id: \w+|[a-z_]+:$)", line) if above != "params:" else None
        if (top and top[1] not in ("params", "steps")) or (inner and not line.startswith("  match:")):
            assert above.lstrip().startswith("#"), f"{line!r} has no comment"
        above = line
    run = nsa("run", name, "--help")
    assert run.code == 0 and all(f"--{param.name}" in run.out for param in recipe.params)


@pytest.mark.parametrize("name", ["explain-repo", "onboarding"])
def test_what_describes_a_repository_is_read(nsa, repo, name):
    reply = run(nsa, name, repo, *BRIEF)
    assert reply["recipe"] == name and reply["answer"] and reply["failed"] == []
    assert reply["usage"]["completion_tokens"] == 120  # notes and the explanation
    seen = nsa("run", name, repo, *BRIEF, "--include", "src", "--json")
    assert json.loads(seen.out)["usage"]["prompt_tokens"] > reply["usage"]["prompt_tokens"]  # --include replaces


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("api-docs", ["src/login.py", "src/route.py"]),
        ("test-gaps", ["src/login.py", "src/route.py"]),
        ("security-review", ["src/login.py"]),
        (
            "code-review",
            ["Makefile", "pyproject.toml", "src/blank.py", "src/login.py", "src/route.py", "tests/test_route.py"],
        ),
    ],
)
def test_code_is_read_file_by_file_where_it_matters(nsa, repo, name, files):
    reply = run(nsa, name, repo, *BRIEF)
    assert parts(reply) == (files if len(files) > 1 else ["src/login.py"])
    if len(files) > 1:
        assert re.findall(r"^## (.*)", reply["answer"], re.M) == files


def test_todos_are_listed_as_json(nsa, repo):
    reply = run(nsa, "todo-triage", repo, *WHOLE)
    assert parts(reply) == ["src/login.py", "src/route.py", "tests/test_route.py"]
    assert json.loads(reply["answer"]) == reply["data"] == [item for part in reply["parts"] for item in part["data"]]
    assert all(item["priority"] in ("low", "medium", "high") and len(item) == 2 for item in reply["data"])
    assert nsa("run", "todo-triage", repo / "README.md", *WHOLE).code == 3  # there are none


def test_imports_are_listed_as_json(nsa, repo):
    reply = run(nsa, "dependency-map", repo, *WHOLE)
    assert parts(reply) == ["src/login.py", "src/route.py"] and len(reply["data"]) == 2
    assert all(list(item) == ["modules", "purpose"] for item in reply["data"])


def test_a_changelog_comes_from_the_repositorys_or_piped_commits(nsa, repo, monkeypatch):
    log = subprocess.run(["git", "-C", repo, "log", "--oneline"], capture_output=True, text=True, check=True).stdout
    assert run(nsa, "changelog", "--version", "1.2", *BRIEF, stdin=log)["answer"]
    assert nsa("run", "changelog", stdin="").code == 3
    monkeypatch.chdir(repo)
    own = run(nsa, "changelog", "--log", 5, *BRIEF)
    assert own["answer"] and own["usage"]["prompt_tokens"] < sum(
        map(len, FILES.values())
    )  # a token a byte: the log, not the files


def test_a_book_is_summarized_by_way_of_its_chapters(nsa, book):
    done = nsa("run", "book-summary", book, *BRIEF, "--json")
    reply = json.loads(done.out)
    assert "chapters 1 of 2: lamp.txt: ch. 1, " in done.err
    assert 'chapters 2 of 2: lamp.txt: ch. 2 "The Letter", ' in done.err
    assert reply["shards"] == 2 and reply["usage"]["completion_tokens"] == 60 + 2 * 90
    assert {place["path"] for place in reply["evidence"]} <= {"lamp.txt"}


def test_every_chapter_has_its_summary(nsa, book):
    reply = run(nsa, "chapter-summaries", book, *BRIEF)
    assert parts(reply) == ["lamp.txt: ch. 1", 'lamp.txt: ch. 2 "The Letter"']
    shown = nsa("run", "chapter-summaries", book, *BRIEF)
    assert shown.out == reply["answer"] + "\n" and shown.out.count("## lamp.txt") == 2


@pytest.mark.parametrize(
    ("name", "keys", "least"),
    [
        ("characters", ["name", "about"], 0),
        ("timeline", ["when", "what"], 0),
        ("question-set", ["question", "answer"], 1),
    ],
)
def test_a_book_gives_lists_as_json(nsa, book, name, keys, least):
    if name == "question-set":  # of one chapter, since the tiny checkpoint fills every text to its limit
        Path(book).write_text(BOOK.partition("CHAPTER II")[0])
    reply = run(nsa, name, book, *WHOLE)
    assert len(reply["data"]) >= least and all(list(item) == keys for item in reply["data"])
    if name == "timeline":  # only the dated lines are read
        assert reply["usage"]["prompt_tokens"] < 400
