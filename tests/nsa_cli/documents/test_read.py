"""Paths as they are named -> documents and skips."""

import io
import os
import threading

import pytest

from nsa_cli.documents import Document, ReadOptions, Skip, read, read_documents
from nsa_models.errors import InputError
from tests.nsa_cli.documents import make

OPTIONS = ReadOptions()


def paths(documents: list) -> list[str]:
    return [document.path for document in documents]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for path in ("b.txt", "a/z.txt", "a-b.txt", "a/é.txt", "c/d/e.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"this is {path}\r\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_directory_shows_paths_relative_to_it(tree) -> None:
    for name in (".", str(tree), f"{tree}/", "c/.."):
        documents, skips = read_documents([name], OPTIONS)
        assert paths(documents) == ["a-b.txt", "a/z.txt", "a/é.txt", "b.txt", "c/d/e.txt"]
        assert skips == []
    assert documents[0] == Document("a-b.txt", "this is a-b.txt\n")


def test_several_arguments_show_paths_as_typed_and_each_file_once(tree) -> None:
    expected = ["a/z.txt", "a/é.txt", "b.txt", "c/d/e.txt"]
    for names in (["a", "c", "b.txt"], ["b.txt", "c", "a", "a", "a/z.txt", "./b.txt"]):
        assert paths(read_documents(names, OPTIONS)[0]) == expected
    assert paths(read_documents(["b.txt"], OPTIONS)[0]) == ["b.txt"]
    assert paths(read_documents([f"{tree}/b.txt", "a"], OPTIONS)[0]) == [f"{tree}/b.txt", "a/z.txt", "a/é.txt"]


def test_order_does_not_depend_on_the_file_system(tree, monkeypatch) -> None:
    expected = read_documents(["."], OPTIONS)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: sorted(scandir(path), key=lambda entry: entry.name[::-1]))
    assert read_documents(["."], OPTIONS) == expected


def test_every_skip_has_its_reason(tree) -> None:
    (tree / "big.txt").write_bytes(b"some text\n" * 320_000)
    (tree / "image").write_bytes(b"\x89PNG\r\n\0")
    (tree / "empty.py").write_text(" \n")
    (tree / "link").symlink_to("b.txt")
    os.mkfifo(tree / "fifo")
    documents, skips = read_documents(["."], OPTIONS)
    assert len(documents) == 5
    assert skips == [
        Skip("big.txt", "3.2 MB, over the limit of 1 MB"),
        Skip("empty.py", "empty"),
        Skip("fifo", "not a regular file"),
        Skip("image", "binary (PNG image)"),
        Skip("link", "symbolic link; --follow-links reads it"),
    ]
    assert "big.txt" in paths(read_documents(["."], ReadOptions(max_file_bytes=4_000_000))[0])


def test_books_of_a_directory_may_be_larger_than_texts(tree) -> None:
    data = make.docx(make.paragraph("words"), **{"media/picture": os.urandom(1_100_000)})
    (tree / "book.docx").write_bytes(data)
    assert "book.docx" in paths(read_documents(["."], OPTIONS)[0])
    _, skips = read_documents(["."], ReadOptions(max_file_bytes=500_000))
    assert skips == [Skip("book.docx", "1.1 MB, over the limit of 500 kB")]


def test_a_named_file_is_read_in_spite_of_limits_ignore_files_and_includes(tree) -> None:
    (tree / ".nsaignore").write_text("b.txt")
    (tree / "b.txt").write_bytes(b"some text\n" * 320_000)
    options = ReadOptions(include=("*.md",))
    assert paths(read_documents(["b.txt"], options)[0]) == ["b.txt"]
    assert paths(read_documents([".", "b.txt"], options)[0]) == ["b.txt"]


def test_exclude_reaches_named_files(tree) -> None:
    assert paths(read_documents(["b.txt", "a-b.txt"], ReadOptions(exclude=("/b.txt",)))[0]) == ["a-b.txt"]
    absolute = f"{tree}/b.txt"
    assert paths(read_documents([absolute, "a-b.txt"], ReadOptions(exclude=(absolute,)))[0]) == ["a-b.txt"]


def test_links_and_pipes_are_read_when_named(tree) -> None:
    (tree / "link").symlink_to("b.txt")
    os.mkfifo(tree / "fifo")
    writer = threading.Thread(target=(tree / "fifo").write_text, args=("from a pipe",), daemon=True)
    writer.start()
    documents, _ = read_documents(["link", "fifo"], OPTIONS)
    writer.join()
    assert documents == [Document("fifo", "from a pipe"), Document("link", "this is b.txt\n")]


def test_patterns_that_no_shell_expanded(tree) -> None:
    assert paths(read_documents(["*.txt"], OPTIONS)[0]) == ["a-b.txt", "b.txt"]
    assert "c/d/e.txt" in paths(read_documents(["**/*.txt"], OPTIONS)[0])
    (tree / "[x]*.txt").write_text("a name is no pattern")
    assert paths(read_documents(["[x]*.txt"], OPTIONS)[0]) == ["[x]*.txt"]
    with pytest.raises(InputError, match="no such file or directory"):
        read_documents(["*.none"], OPTIONS)


def test_stdin_is_a_document_among_others(tree) -> None:
    stdin = io.BytesIO("\ufeffgrüße\r\n".encode())
    documents, _ = read_documents(["-", "b.txt"], OPTIONS, stdin)
    assert documents == [Document("<stdin>", "grüße\n"), Document("b.txt", "this is b.txt\n")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, "no such file or directory: missing.txt"),
        ("", None, "a path is empty, as an unset variable of a shell is; . is the folder that you are in"),
        ("image.png", b"\x89PNG\r\n\0", "image.png: binary (PNG image); leave it out, or name another file"),
        ("empty.txt", b"\n", "empty.txt: empty; leave it out, or name another file"),
        ("-", b"", "<stdin>: empty; leave it out, or name another file"),
        ("-", b"a\0b", "<stdin>: binary; leave it out, or name another file"),
        ("big.txt", b"x" * 1001, "big.txt: 1.0 kB, over the limit of 1 kB; leave it out, or name another file"),
        ("-", b"x" * 1001, "<stdin>: over the limit of 1 kB; leave it out, or name another file"),
    ],
)
def test_what_is_named_and_cannot_be_read_is_an_error(tree, monkeypatch, name, content, message) -> None:
    monkeypatch.setattr(read, "MAX_NAMED_BYTES", 1000)
    if content is not None and name != "-":
        (tree / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_documents([name, "b.txt"], ReadOptions(max_file_bytes=1), io.BytesIO(content or b""))
    assert str(error.value) == message
    assert error.value.exit_code == 3


def test_nothing_to_read_says_what_was_there(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"nothing to read in \.: no file matches \*\.c, \*\.h$"):
        read_documents(["."], ReadOptions(include=("*.c", "*.h")))
    with pytest.raises(InputError, match=r"nothing to read in \.; .*--no-gitignore.*--hidden"):
        read_documents(["."], OPTIONS)
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(b"\0")
    with pytest.raises(InputError, match=r"nothing to read in \.; skipped a\.bin \(binary\) and 1 more"):
        read_documents(["."], OPTIONS)


def test_the_total_is_limited(tree, monkeypatch) -> None:
    monkeypatch.setattr(read, "MAX_TOTAL_BYTES", 30)
    with pytest.raises(InputError, match="more than 30 bytes of text"):
        read_documents(["."], OPTIONS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_skipped(tree) -> None:
    (tree / "b.txt").chmod(0)
    (tree / "c").chmod(0)
    _, skips = read_documents(["."], OPTIONS)
    assert skips == [Skip("b.txt", "permission denied"), Skip("c/", "permission denied")]
    (tree / "c").chmod(0o755)


def test_names_that_are_no_text_are_shown_harmlessly(tmp_path) -> None:
    for name in (b"bad\xff.txt", b"bad\xfe.txt", b"line\nend.txt", b"escape\x1b[31m.txt"):
        (tmp_path / os.fsdecode(name)).write_text("x")
    documents, _ = read_documents([str(tmp_path)], OPTIONS)
    assert paths(documents) == ["bad\ufffd.txt", "bad\ufffd.txt", "escape\ufffd[31m.txt", "line\ufffdend.txt"]
