"""git's history as documents: revisions, diffs, logs; and nothing that a repository could make run."""

import os
import subprocess

import pytest

from nsa_cli.documents import ReadOptions, read_documents
from nsa_models.errors import InputError


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Ada")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    root = tmp_path / "work"
    (root / "src").mkdir(parents=True)
    (root / "src" / "a.py").write_text("a = 1\n")
    (root / "src" / "gone.py").write_text("gone = 1\n")
    (root / "old").mkdir()
    (root / "old" / "b.txt").write_text("b\n")
    (root / "uv.lock").write_text("lock\n")
    (root / "né.txt").write_text("é\n")
    (root / "link").symlink_to("né.txt")
    git(root, "init", "-q", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "-qm", "First")
    git(root, "tag", "v1")
    (root / "src" / "a.py").write_text("a = 2\n")
    git(root, "rm", "-q", "-r", "old", "src/gone.py")
    git(root, "commit", "-qam", "Second\n\nWith a body.")
    (root / "src" / "a.py").write_text("a = 3\n")
    return root


def git(root, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout


def read(paths, **options) -> dict[str, str]:
    return {d.path: d.text for d in read_documents([str(path) for path in paths], ReadOptions(**options))[0]}


def test_files_of_a_revision(repository) -> None:
    expected = {"né.txt": "é\n", "old/b.txt": "b\n", "src/a.py": "a = 1\n", "src/gone.py": "gone = 1\n"}
    assert read([repository], revision="v1") == expected
    assert read([repository], revision="v1", keep=("locks",)).keys() == {*expected, "uv.lock"}
    assert read([repository / "src"], revision="v1") == {"a.py": "a = 1\n", "gone.py": "gone = 1\n"}
    assert read([repository], revision="main~1", include=("*.py",), exclude=("gone.py",)) == {"src/a.py": "a = 1\n"}
    assert read([repository / "src" / "gone.py"], revision="v1") == {f"{repository}/src/gone.py": "gone = 1\n"}
    assert list(read([repository / "old"], revision="v1").values()) == ["b\n"]  # gone from the work tree


def test_one_process_reads_all_files_of_a_revision(repository, monkeypatch) -> None:
    for i in range(30):
        (repository / f"f{i}.txt").write_bytes(f"{i}\n".encode() * i + b"end")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "Third")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    found = read([repository], revision="HEAD")
    assert all(found[f"f{i}.txt"] == f"{i}\n" * i + "end" for i in range(30))
    assert len(started) < 5


def test_a_diff_and_a_log_beside_files_or_alone(repository, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    assert read([], diff="HEAD").keys() == {"<git diff HEAD>"}
    assert "-a = 2\n+a = 3\n" in read([], diff="HEAD")["<git diff HEAD>"]
    assert "-a = 1\n+a = 2\n" in read([], diff="v1..main")["<git diff v1..main>"]
    found = read(["src"], diff="v1", log=5)
    assert found.keys() == {"<git diff v1>", "<git log -5>", "a.py"}
    assert "old/b.txt" not in found["<git diff v1>"]
    assert "With a body." in found["<git log -5>"]
    assert "First" not in read([], log=1)["<git log -1>"]
    assert read(["src"], log=5, no_files=True).keys() == {"<git log -5>"}
    assert read([], diff="HEAD..HEAD") == {"<git diff HEAD..HEAD>": "(git diff HEAD..HEAD: nothing)\n"}


@pytest.mark.parametrize(
    "options", [{"revision": "nope"}, {"diff": "nope"}, {"revision": "--output=x"}, {"diff": "--output=x"}]
)
def test_what_git_does_not_know_is_one_line(repository, options) -> None:
    with pytest.raises(InputError) as error:
        read([repository], **options)
    assert "\n" not in str(error.value)
    assert not (repository / "x").exists()


def test_only_the_log_of_a_repository_that_is_named(repository, nsa) -> None:
    run = nsa("pack", repository, "--log", 1, "--no-files")
    assert (run.code, run.out.split("\n")[0]) == (0, "=== <git log -1> ===")
    assert "Second" in run.out and "a = 3" not in run.out
    assert nsa("pack", repository, "--no-files").code == 2


def test_history_needs_a_repository(tmp_path) -> None:
    (tmp_path / "a").write_text("x")
    for options in ({"revision": "HEAD"}, {"diff": "HEAD"}, {"log": 1}):
        with pytest.raises(InputError, match="git"):
            read([tmp_path], **options)


def test_a_repository_cannot_have_a_program_run_by_its_history(repository, monkeypatch) -> None:
    hook = repository / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {repository}/ran\ncat\n")
    hook.chmod(0o755)
    (repository / ".gitattributes").write_text("*.py filter=evil diff=evil\n")
    for key in ("filter.evil.clean", "filter.evil.process", "diff.evil.command", "diff.evil.textconv", "diff.external"):
        git(repository, "config", key, str(hook))
    for key, value in {"gpg.program": str(hook), "log.showSignature": "true", "core.fsmonitor": str(hook)}.items():
        git(repository, "config", key, value)
    os.utime(repository / "src" / "a.py", (1, 1))  # git has to look at the file again
    read([repository], diff="HEAD", log=3)
    read([repository], revision="v1")
    assert not (repository / "ran").exists()
    subprocess.run(["git", "-C", repository, "diff", "HEAD"], capture_output=True)
    assert (repository / "ran").exists(), "git no longer runs what this test protects from"


def test_lists_of_files(repository, monkeypatch, nsa) -> None:
    monkeypatch.chdir(repository)
    names = "src/a.py\nmissing.py\nold\n"
    run = nsa("pack", "--files-from", "-", stdin=names)
    assert (run.code, run.out) == (0, "=== src/a.py ===\na = 3\n")
    assert "missing.py (no such file or directory)" in run.err
    (repository / "list").write_bytes("né.txt\0uv.lock\0".encode())
    run = nsa("pack", "src", "--files-from", "list", "-0")
    assert [line for line in run.out.split("\n") if line.startswith("===")] == [
        "=== né.txt ===",
        "=== src/a.py ===",
        "=== uv.lock ===",  # named, so read in spite of what is left out by default
    ]
    assert nsa("pack", "-0").code == 2
    assert nsa("pack", "--files-from", "none").code == 3
    assert nsa("pack", "--files-from", "-", stdin="\n").code == 3


def test_submodules_on_request(repository) -> None:
    inner = repository / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / ".gitignore").write_text("no.txt\n")
    (inner / "yes.txt").write_text("y")
    (inner / "no.txt").write_text("n")
    assert "inner/yes.txt" not in read([repository])
    found = read([repository], submodules=True)
    assert "inner/yes.txt" in found and "inner/no.txt" not in found
