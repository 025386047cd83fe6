"""What is left out of a directory: against git itself, and layer by layer."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_cli.documents import ReadOptions, ignore
from nsa_cli.documents.walk import walk

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
EVERYTHING = ReadOptions(hidden=True, default_ignores=False)


@pytest.fixture(autouse=True)
def no_user_configuration(monkeypatch, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return home


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


def write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def found(root: Path, options: ReadOptions = EVERYTHING, shown: str = "") -> list[str]:
    return sorted(f.path for f in walk(root.resolve(), options, shown) if f.reason is None)


def found_by_patterns(root: Path, options: ReadOptions = EVERYTHING) -> list[str]:
    """As on a machine without git."""
    with mock.patch.object(ignore, "git_listing", return_value=None):
        return found(root, options)


def listed_by_git(root: Path) -> list[str]:
    return sorted(filter(None, git(root, "ls-files", "-co", "--exclude-standard", "-z").split("\0")))


NAMES = st.sampled_from(["a", "b", "foo", "keep.log", "x.log", "build", ".h", "a b", "né", "#c", "!d", "[e]", "f\\g"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
GLOBS = st.sampled_from(
    ["*", "**", "a", "b", "foo", "*.log", "keep.log", "build", ".*", "?", "[ab]", "[!a]", "f*", "n*é", "a b", "\\#c"]
    + ["\\!d", "\\[e\\]", "f\\\\g", "[", "*o*"]
)
LINES = st.one_of(
    st.sampled_from(["", "# comment", "/", "!", "!/", "*/", "!*/", "**/", "/*", "/**", "a/**/", "foo//", "a ", "\\"]),
    st.builds(
        lambda negated, rooted, globs, directory: negated + rooted + "/".join(globs) + directory,
        st.sampled_from(["", "", "!"]),
        st.sampled_from(["", "", "/"]),
        st.lists(GLOBS, min_size=1, max_size=3),
        st.sampled_from(["", "", "/"]),
    ),
)
IGNORE_FILES = st.dictionaries(
    st.one_of(st.just(""), PATHS.map(lambda path: path + "/")), st.lists(LINES, min_size=1, max_size=5), max_size=3
)


def make_tree(root: Path, paths: list[str], ignore_files: dict[str, list[str]]) -> None:
    """Files at `paths`, except where one would have to be a directory as well."""
    for path in paths + [f"{directory}.gitignore" for directory in ignore_files]:
        target = root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.write_text("\n".join(ignore_files.get(path.removesuffix(".gitignore"), ["x"])) + "\n")
        except (FileExistsError, NotADirectoryError):
            continue


@needs_git
@settings(max_examples=80, deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=12), IGNORE_FILES, st.lists(LINES, max_size=2), st.lists(LINES, max_size=2))
@example(["build/keep.log", "x.log"], {"": ["*.log", "!keep.log", "build/"]}, [], [])
@example(["foo/a", "foo/b/a"], {"": ["foo/**", "!foo/b/"]}, [], [])
@example(["a/b", "b"], {"": ["*", "!*/", "!.gitignore"]}, [], [])
@example(["a/b/keep.log"], {"": ["*.log"], "a/b/": ["!keep.log"]}, ["a"], ["!a"])
def test_patterns_agree_with_git(paths, ignore_files, excludes, user_excludes) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", XDG_CONFIG_HOME=f"{folder}/home"):
        write(Path(folder), {"home/git/ignore": "\n".join(user_excludes)})
        root = Path(folder, "work")
        write(root, {".git/info/exclude": "\n".join(excludes), ".git/HEAD": "ref: refs/heads/main\n"})
        for name in ("objects", "refs"):  # what `git init` makes, without a process
            (root / ".git" / name).mkdir()
        make_tree(root, paths, ignore_files)
        expected = listed_by_git(root)
        assert found_by_patterns(root) == expected
        assert found(root) == expected or not expected
        for directory in {path.partition("/")[0] for path in expected if "/" in path}:
            assert found_by_patterns(root / directory) == listed_by_git(root / directory)


@needs_git
def test_what_git_tracks_is_read_and_what_is_hidden_is_not(tmp_path) -> None:
    write(tmp_path, {".gitignore": "*.log\n", "kept.log": "x", "x.log": "x", ".github/ci.yml": "x", "gone": "x"})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-f", ".gitignore", "kept.log", ".github/ci.yml", "gone")
    (tmp_path / "gone").unlink()
    write(tmp_path, {".secret": "x", "new.py": "x"})
    visible = [".github/ci.yml", ".gitignore", "kept.log", "new.py"]
    assert found(tmp_path, ReadOptions()) == visible
    assert found(tmp_path, ReadOptions(hidden=True)) == sorted([*visible, ".secret"])
    assert found(tmp_path, ReadOptions(gitignore=False)) == sorted([*visible, "x.log"])
    assert found_by_patterns(tmp_path, ReadOptions()) == ["new.py"]


@needs_git
def test_an_ignored_directory_is_read_when_it_is_named(tmp_path) -> None:
    write(tmp_path, {".gitignore": "/out/\n*.o\n", "out/a.txt": "x", "out/b.o": "x"})
    git(tmp_path, "init", "-q")
    assert found(tmp_path / "out") == ["a.txt"]


@needs_git
def test_repositories_inside_a_repository_are_named_not_read(tmp_path) -> None:
    write(tmp_path, {"a": "x", "inner/b": "x"})
    git(tmp_path, "init", "-q")
    git(tmp_path / "inner", "init", "-q")
    assert [(f.path, f.reason) for f in walk(tmp_path.resolve(), EVERYTHING) if f.path != "a"] == [
        ("inner", "a repository of its own; --submodules reads it")
    ]
    shutil.rmtree(tmp_path / ".git")
    assert found(tmp_path) == ["a", "inner/b"]


@needs_git
def test_a_repository_cannot_have_a_program_run(tmp_path) -> None:
    write(tmp_path, {"a": "x", "hook.sh": f"#!/bin/sh\ntouch {tmp_path}/ran\n"})
    (tmp_path / "hook.sh").chmod(0o755)
    git(tmp_path, "init", "-q")
    git(tmp_path, "config", "core.fsmonitor", str(tmp_path / "hook.sh"))
    assert found(tmp_path) == ["a", "hook.sh"]
    assert not (tmp_path / "ran").exists()
    subprocess.run(["git", "-C", tmp_path, "status"], capture_output=True)
    assert (tmp_path / "ran").exists(), "git no longer runs what this test protects from"


@needs_git
def test_git_s_own_environment_does_not_lead_elsewhere(tmp_path, monkeypatch) -> None:
    write(tmp_path, {"one/a": "x", "one/.gitignore": "b", "one/b": "x", "two/c": "x"})
    for name in ("one", "two"):
        git(tmp_path / name, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "two" / ".git"))
    assert found(tmp_path / "one") == [".gitignore", "a"]


def test_a_worktree_without_git_reads_the_parents_files(tmp_path) -> None:
    write(tmp_path, {".gitignore": "*.tmp", "sub/.gitignore": "!keep.tmp", "sub/deep/a.tmp": "x", "sub/keep.tmp": "x"})
    write(tmp_path, {".git/HEAD": "", "sub/deep/b": "x"})
    assert found_by_patterns(tmp_path / "sub") == [".gitignore", "deep/b", "keep.tmp"]
    assert found_by_patterns(tmp_path / "sub" / "deep") == ["b"]


def test_own_ignore_files_and_defaults(tmp_path) -> None:
    write(tmp_path, {".ignore": "a\n", ".nsaignore": "b\n!uv.lock\n", "a": "x", "b": "x", "c": "x", "uv.lock": "x"})
    write(tmp_path, {"node_modules/d": "x", "yarn.lock": "x", "sub/.nsaignore": "!a\n", "sub/a": "x", "e.min.js": "x"})
    assert found(tmp_path, ReadOptions()) == ["c", "sub/a", "uv.lock"]
    everything = ["c", "e.min.js", "node_modules/d", "sub/a", "uv.lock", "yarn.lock"]
    assert found(tmp_path, ReadOptions(default_ignores=False)) == everything
    assert found(tmp_path, ReadOptions(keep=("locks",))) == ["c", "sub/a", "uv.lock", "yarn.lock"]
    assert found(tmp_path, ReadOptions(keep=("minified", "packages"), own_ignores=False)) == sorted(
        ["a", "b", "c", "e.min.js", "node_modules/d", "sub/a"]
    )


def test_include_and_exclude_work_together(tmp_path) -> None:
    write(tmp_path, dict.fromkeys(["a.py", "b.md", "docs/c.md", "docs/old/d.md", "src/docs/e.c", "src/f.py"], "x"))
    assert found(tmp_path, ReadOptions(include=("*.py",))) == ["a.py", "src/f.py"]
    assert found(tmp_path, ReadOptions(include=("docs",))) == ["docs/c.md", "docs/old/d.md", "src/docs/e.c"]
    assert found(tmp_path, ReadOptions(include=("/docs", "*.py"), exclude=("old", "/src"))) == ["a.py", "docs/c.md"]
    assert found(tmp_path, ReadOptions(include=("*.md", "!b.md"))) == ["docs/c.md", "docs/old/d.md"]
    assert found(tmp_path, ReadOptions(exclude=("project/docs", "*.py")), "project/") == ["b.md", "src/docs/e.c"]


@settings(max_examples=60, deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=8), st.lists(st.tuples(PATHS, PATHS), max_size=6))
def test_followed_links_end_and_no_directory_is_read_twice(paths, links) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root").resolve()
        root.mkdir()
        make_tree(root, paths, {})
        for at, target in links:
            try:
                (root / at).parent.mkdir(parents=True, exist_ok=True)
                (root / at).symlink_to(root / target if len(at) % 2 else Path(target))
            except OSError:
                continue
        options = ReadOptions(hidden=True, default_ignores=False, gitignore=False, follow_links=True)
        read = found(root, options)
        assert len(read) == len(set(read))
        directories = [(root / path).parent.resolve() / Path(path).name for path in read]
        assert len(directories) == len(set(directories))
        # What is there without a link is read all the same, under its own name or another's.
        real = {(root / path).resolve() for path in read}
        assert {(root / path).resolve() for path in found(root, EVERYTHING)} <= real


def test_links_are_named_and_never_followed(tmp_path) -> None:
    root = write(tmp_path / "root", {"a": "x"})
    write(tmp_path, {"outside/secret": "x"})
    (root / "cycle").symlink_to(root)
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "file").symlink_to(tmp_path / "outside" / "secret")
    assert {f.path: f.reason for f in walk(root.resolve(), EVERYTHING)} == {
        "a": None,
        "cycle": "symbolic link; --follow-links reads it",
        "out": "symbolic link; --follow-links reads it",
        "file": "symbolic link; --follow-links reads it",
    }
