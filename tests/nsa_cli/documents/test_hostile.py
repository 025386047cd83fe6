"""Files made to do harm: refused or read with one clear line, in bounded memory."""

import io
import os
import struct
import subprocess
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_cli.documents import ReadOptions, archive, pdf, read_documents
from nsa_cli.documents.document import Extract, NotText
from nsa_cli.documents.readers import extract
from nsa_models.errors import InputError
from tests.nsa_cli.documents import make

OPTIONS = ReadOptions()
PAGE = {"a.xhtml": "<h1>A</h1><p>text</p>"}
LAUGHS = "<!DOCTYPE x [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {chr(b + 1)} '{('&' + chr(b) + ';') * 10}'>" for b in range(ord("a"), ord("j"))
)


def refusal(data: bytes, name: str = "x") -> str:
    with pytest.raises(NotText) as error:
        extract(data, name, OPTIONS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_references_out_of_an_archive_are_refused(tmp_path) -> None:
    for target in ("../../../../etc/passwd", "/etc/passwd", "a\\..\\b"):
        members = {"META-INF/container.xml": make.CONTAINER.format(package=target)}
        assert "outside of itself" in refusal(make.archive(members))
        assert "outside of itself" in refusal(make.epub(PAGE, make.ncx([("x", target)])))
    # Members with such names are never unpacked.
    data = make.epub(PAGE, **{"../../evil": "x", "/abs": "x"})
    assert "text" in extract(data, "x", OPTIONS).text
    assert list(tmp_path.iterdir()) == []


def test_zip_bombs_are_refused_by_what_they_inflate_to(monkeypatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBER", 1_000_000)
    monkeypatch.setattr(archive, "MAX_TOTAL", 3_000_000)
    zeros = "<p>" + "0" * 2_000_000
    assert "over 1 MB when inflated" in refusal(make.epub({"a.xhtml": zeros}))
    many = {f"{i}.xhtml": "<p>" + "0" * 900_000 for i in range(5)}
    assert "when inflated" in refusal(make.epub(many))
    assert "over 1 MB when inflated" in refusal(make.docx("<w:p/>" * 200_000))
    # The archive's own word on a size is not taken.
    lying = make.epub({"a.xhtml": zeros})
    size = struct.pack("<I", len(zeros) + len('<?xml version="1.0"?><!DOCTYPE html>') + 52)
    assert refusal(lying.replace(size, struct.pack("<I", 10)))


def test_too_many_members_and_damaged_archives_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(archive, "MAX_DIRECTORY", 5000)
    assert "too many members" in refusal(make.epub(PAGE, **{f"m{i}": "" for i in range(200)}))
    whole = make.epub(PAGE)
    assert "damaged" in refusal(whole[: len(whole) // 2])
    assert "binary (zip archive)" in refusal(make.archive({"x": "y"}))
    stream = io.BytesIO(whole)
    with zipfile.ZipFile(stream) as source:
        offset = source.getinfo("OEBPS/a.xhtml").header_offset
    broken = bytearray(whole)
    broken[offset + 50 : offset + 60] = b"\xff" * 10
    assert "damaged EPUB" in refusal(bytes(broken))


def test_xml_bombs_are_refused() -> None:
    bomb = f'<?xml version="1.0"?>{LAUGHS}]><x>&j;</x>'
    expected = "declares entities, as XML bombs do"
    assert expected in refusal(make.archive({"META-INF/container.xml": bomb}))
    assert expected in refusal(make.archive({"word/document.xml": bomb}))
    assert expected in refusal(make.epub(PAGE, bomb))
    outside = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><x>&f;</x>'
    assert expected in refusal(make.archive({"word/document.xml": outside}))


def test_pdf_bombs_end(monkeypatch) -> None:
    catalog, font = "<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    loop = "<< /Type /Pages /Kids [2 0 R] /Count 1 >>"
    assert "damaged PDF" in refusal(make.pdf_file([catalog, loop]))
    pages = "<< /Type /Pages /Kids [4 0 R] /Count 1 >>"
    page = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 5 0 R /Resources {} >>"
    drawn = "/XObject << /X {} 0 R >>"
    form = "<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << {} >> /Length {} >>\nstream\n{}\nendstream"
    tenfold = [form.format(drawn.format(7 + i), 60, "/X Do " * 10) for i in range(8)]  # 10^8 times what is inmost
    inmost = form.format("/Font << /F 3 0 R >>", 23, "BT /F 9 Tf (ha) Tj ET  ")
    content = "<< /Length 5 >>\nstream\n/X Do\nendstream"
    laughs = [catalog, pages, font, page.format("<< " + drawn.format(6) + " >>"), content, *tenfold, inmost]
    assert len(extract(make.pdf_file(laughs), "x", OPTIONS).text) < 1_000_000
    monkeypatch.setattr(pdf, "MAX_TEXT", 100)
    assert "more than 100 characters" in refusal(make.pdf(["word " * 30]))


def test_rtf_of_any_size_is_bounded(monkeypatch) -> None:
    from nsa_cli.documents import rtf

    for hostile in ("{" * 100_000, "{\\pict " * 20_000, '{\\field{\\*\\fldinst HYPERLINK "' * 3_000, "\\bin99999999 x"):
        try:
            extract(("{\\rtf1 " + hostile).encode(), "x.rtf", OPTIONS)
        except NotText as error:
            assert "RTF" in str(error)
    monkeypatch.setattr(rtf, "MAX_RTF", 100)
    assert "over the limit of 100" in refusal(b"{\\rtf1 " + b"x" * 100, "x.rtf")


def test_deep_nesting_is_no_crash() -> None:
    assert "word" in extract(("<html>" + "<div>" * 1_000 + "word").encode(), "x.html", OPTIONS).text
    assert "over the limit of 16,000,000" in refusal(b"<html>" + b"x" * 16_000_000, "x.html")
    assert "nested over 2,000 deep" in refusal(("<html>" + "<b><div>" * 50_000).encode(), "x.html")
    assert "nested" in refusal(make.docx("<w:tbl>" * 300 + make.paragraph("x") + "</w:tbl>" * 300))
    assert "damaged notebook" in refusal(b"[" * 100_000, "x.ipynb")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([".pdf", ".epub", ".docx", ".rtf", ".ipynb", ".html", ".csv", ".md", ".txt", ""]), st.data())
def test_damage_of_any_kind_is_read_or_refused(suffix: str, data) -> None:
    whole = {
        ".pdf": make.pdf(["one page", "two"]),
        ".epub": make.epub(PAGE, make.ncx([("A", "a.xhtml")])),
        ".docx": make.docx(make.paragraph("x", "H1")),
        ".rtf": rb"{\rtf1\ansi{\fonttbl{\f0 T;}}\pard x\'e9 \u8364?{\pict 00}\bin3 abc\par}",
        ".ipynb": make.notebook([{"source": "x"}]),
        ".html": b"<html><body><h1>x</h1><table><tr><td>y</html>",
        ".csv": b'a,"b\n",c\n' * 5,
    }.get(suffix, b"# x\n\nCHAPTER I.\n\ny\n\nCHAPTER II.\n\nz\n")
    damaged = bytearray(whole)
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        damaged[position] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(1, len(whole)))])
    try:
        found = extract(damaged, "x" + suffix, OPTIONS)
    except NotText as error:
        assert str(error)
        return
    assert isinstance(found, Extract)
    found.text.encode("utf-8")
    assert all(1 <= part.line <= found.text.count("\n") + 1 for part in found.parts)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
from nsa_cli.cli import run
sys.exit(run(sys.argv[2:]))
"""


def run_limited(*arguments: object, memory: int, stdin=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED, str(memory), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=stdin)


def test_half_a_gigabyte_in_one_line_is_refused_unread(tmp_path, monkeypatch, tiny_checkpoint) -> None:
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "cache"))
    big = tmp_path / "big.txt"
    with open(big, "wb") as stream:
        stream.truncate(500_000_000)  # a hole: no disk is filled
    for arguments in ((big,), (tmp_path,), ("-",)):
        with open(big, "rb") as stdin:
            run = run_limited("plan", *arguments, "--model", tiny_checkpoint, memory=700_000_000, stdin=stdin)
        assert (run.returncode, run.stderr.count("\n")) == (3, 1), run.stderr
        assert "over the limit of" in run.stderr


def test_a_long_line_is_encoded_in_bounded_memory(tmp_path, monkeypatch, tiny_checkpoint) -> None:
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "line.txt").write_text("the quick fox " * 300_000)  # 4.2 MB in one encoding would take over 600 MB
    run = run_limited(
        "plan", tmp_path / "line.txt", "--model", tiny_checkpoint, "--max-context", "1k", memory=1_500_000_000
    )
    assert run.returncode == 4, run.stderr
    assert "more than the" in run.stderr


def test_loops_of_links_end(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    (tmp_path / "a" / "f.txt").write_text("text")
    for follow in (False, True):
        documents, skips = read_documents([str(tmp_path)], ReadOptions(follow_links=follow))
        assert [document.path for document in documents] == ["a/f.txt"]
        assert {skip.path for skip in skips} == {"a/up", "self", "x", "y"}
    with pytest.raises(InputError):
        read_documents([str(tmp_path / "self")], OPTIONS)


def test_links_are_followed_where_that_is_asked_for(tmp_path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.txt").write_text("b")
    (tmp_path / "root" / "a.txt").write_text("a")
    (tmp_path / "root" / "dir").symlink_to(tmp_path / "out")
    (tmp_path / "root" / "again").symlink_to("a.txt")
    (tmp_path / "root" / "gone").symlink_to("nowhere")
    documents, skips = read_documents([str(tmp_path / "root")], ReadOptions(follow_links=True))
    assert sorted(d.text for d in documents) == ["a", "b"]
    assert [skip.path for skip in skips] == ["gone"]


def test_names_with_line_ends_and_bytes_that_are_no_text(tmp_path, nsa) -> None:
    for name in (b"line\nend.txt", b"\xff.txt", b"esc\x1b[2J.txt", b"=== x ===\n.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"caf\xe9 \xff\xfe text\n")
    run = nsa("pack", tmp_path)
    assert run.code == 0
    assert sum(line.startswith("=== ") and line.endswith(".txt ===") for line in run.out.split("\n")) == 4
    assert "\x1b" not in run.out + run.err
    listed = b"\0".join([os.fsencode(tmp_path) + b"/line\nend.txt", b"missing\nfile"]) + b"\0"
    run = nsa("pack", "--files-from", "-", "-0", stdin=listed)
    assert run.code == 0
    assert "line\ufffdend.txt ===\n" in run.out
    assert "missing\ufffdfile (no such file or directory)" in run.err
