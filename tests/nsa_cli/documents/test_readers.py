"""Books, pages, notebooks and tables as text, with the places that a citation names."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_cli.documents import Document, ReadOptions, Skip, read_documents
from nsa_cli.documents.chapters import book_parts, markdown_parts, rst_parts
from nsa_cli.documents.document import NotText, Part
from nsa_cli.documents.readers import extract
from tests.nsa_cli.documents import make

OPTIONS = ReadOptions()


def read(data: bytes, name: str, options: ReadOptions = OPTIONS):
    return extract(data, name, options)


def labels(found) -> list[str]:
    """The parts' labels, each checked to stand at the line it names where the text shows it."""
    lines = found.text.split("\n")
    for part in found.parts:
        assert lines[part.line - 1].strip(), part
    return [part.label for part in found.parts]


def test_pdf_has_pages_with_their_numbers() -> None:
    found = read(make.pdf(["Front matter", "Call me Ishmael.\nSome years ago", "", "The end"]), "book.pdf")
    assert labels(found) == ["p. 1", "p. 2", "p. 4"]
    assert found.text == "[p. 1]\nFront matter\n[p. 2]\nCall me Ishmael.\nSome years ago\n[p. 4]\nThe end\n"
    assert found.converted
    roman = "/PageLabels << /Nums [0 << /S /r >> 2 << /S /D >>] >>"
    assert labels(read(make.pdf(["a", "b", "c"], roman), "x")) == ["p. 1 (i)", "p. 2 (ii)", "p. 3 (1)"]


def test_pdf_without_text_and_damaged_pdf_say_so() -> None:
    with pytest.raises(NotText, match="PDF without text: scanned pages need OCR"):
        read(make.pdf([""]), "scan.pdf")
    with pytest.raises(NotText, match="damaged PDF"):
        read(b"%PDF-1.7\nnothing of a PDF", "x.pdf")


def test_epub_has_the_chapters_of_its_table_of_contents() -> None:
    chapters = {
        "cover.xhtml": "<p>The Book</p>",
        "one.xhtml": "<h1>Loomings</h1><p>Call me <i>Ishmael</i>.</p>",
        "one_b.xhtml": "<p>It goes on.</p>",
        "rest.xhtml": "<h2 id='c2'>The Carpet-Bag</h2><p>A shirt.</p><h2 id='c3'>The Inn</h2><p>Entering.</p>",
    }
    toc = make.ncx([("Loomings", "one.xhtml"), ("The Carpet-Bag", "rest.xhtml#c2"), ("The Inn", "rest.xhtml#c3")])
    found = read(make.epub(chapters, toc), "novel.epub")
    assert labels(found) == ['ch. 1 "Loomings"', 'ch. 2 "The Carpet-Bag"', 'ch. 3 "The Inn"']
    assert found.text.startswith('The Book\n[ch. 1 "Loomings"]\n# Loomings\n\nCall me Ishmael.\nIt goes on.\n')
    document = Document("novel.epub", found.text, found.parts, found.converted)
    inn = found.text[: found.text.index("Entering")].count("\n") + 1
    assert document.cite(inn, inn) == 'novel.epub ch. 3 "The Inn"'
    assert document.cite(4, inn) == 'novel.epub ch. 1 "Loomings" to ch. 3 "The Inn"'


def test_epub_3_navigation_names_chapters_and_sections() -> None:
    nav = (
        "<nav epub:type='toc'><ol><li><a href='a.xhtml'>One</a><ol><li><a href='a.xhtml#s'>Deep</a></li></ol></li>"
        "<li><a href='b.xhtml'>Two</a></li></ol></nav>"
    )
    items = '<item id="n" href="nav.xhtml" properties="nav"/>'
    items += '<item id="a" href="a.xhtml"/><item id="b" href="b.xhtml"/>'
    package = make.PACKAGE.format(items=items, spine='<itemref idref="a"/><itemref idref="b"/>')
    members = {"META-INF/container.xml": make.CONTAINER.format(package="book.opf"), "book.opf": package}
    members |= {"nav.xhtml": nav, "a.xhtml": "<p>x</p><p id='s'>y</p>", "b.xhtml": "<p>z</p>"}
    assert labels(read(make.archive(members), "b.epub")) == ['ch. 1 "One"', 'ch. 1 "One" § "Deep"', 'ch. 2 "Two"']


def test_xhtml_elements_may_end_where_they_begin() -> None:
    page = '<p>a<script src="x"/><br/>b <i/>c</p>' + '<span id="s"/>' * 3000 + "<p>d</p>"
    assert read(make.epub({"a.xhtml": page}), "b.epub").text == "a\nb c\n\nd\n"


def test_epub_without_contents_takes_its_headings() -> None:
    found = read(make.epub({"a.xhtml": "<h1>First</h1><p>x</p>", "b.xhtml": "<p>y</p>"}), "b.epub")
    assert labels(found) == ['ch. 1 "First"']
    assert found.text.endswith("x\ny\n")


def test_docx_has_headings_lists_tables_and_notes() -> None:
    row = "<w:tr><w:tc><w:p><w:r><w:t>k</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>v</w:t></w:r></w:p></w:tc></w:tr>"
    listed = "<w:p><w:pPr><w:numPr/></w:pPr><w:r><w:t>item</w:t></w:r></w:p>"
    changed = "<w:p><w:del><w:r><w:delText>old</w:delText></w:r></w:del><w:ins><w:r><w:t>new</w:t></w:r></w:ins></w:p>"
    body = (
        make.paragraph("Methods", "H1") + make.paragraph("We &amp; they") + listed + f"<w:tbl>{row}</w:tbl>" + changed
    )
    notes = f"<w:footnotes {make.W}><w:footnote>{make.paragraph('a note')}</w:footnote></w:footnotes>"
    found = read(make.docx(body + make.paragraph("Results", "H2"), **{"word/footnotes.xml": notes}), "r.docx")
    assert labels(found) == ['§ "Methods"', '§ "Results"']
    assert found.text == "# Methods\nWe & they\n- item\nk | v\nnew\n\n## Results\n\nNotes:\na note\n"


def test_rtf_is_its_text_with_chapters() -> None:
    body = "It was a long day, and much was said about the lamp and the boat on the lake. "
    head = r"{\rtf1\ansi\ansicpg1252{\fonttbl{\f0 Times;}}{\*\generator x;}{\pict\pngblip 89504e47}"
    rtf = (
        head
        + rf"\par Chapter 1. The Caf\'e9\par\par {body}\u8364?\par\par Chapter 2\par\par {body}\u-10179?\u-8703?\par}}"
    )
    found = read(rtf.encode(), "novel.rtf")
    assert labels(found) == ['ch. 1 "The Café"', "ch. 2"]
    assert found.text == f"\nChapter 1. The Café\n\n{body}€\n\nChapter 2\n\n{body}\U0001f601\n"
    assert found.converted
    for bad, why in ((rb"{\rtf1\u99999999999 ?}", "damaged RTF"), (rb"{\rtf1}", "RTF without text")):
        with pytest.raises(NotText, match=why):
            read(bad, "x.rtf")


def test_html_is_its_text_without_what_surrounds_it() -> None:
    page = (
        "<!doctype html><html><head><title>T</title><style>p{}</style></head><body><nav>menu</nav><main><h1>One &amp; "
        "two<a href='#x'>¶</a></h1>"
        "<p>A <b>bold</b>\n word<br>next</p><ul><li>a<li>b</ul><pre>  x\n    y</pre><script>no()</script>"
        "<table><tr><td>1<td>2</table></main><footer>foot</footer></body></html>"
    )
    for name in ("page.html", "<stdin>"):
        found = read(page.encode(), name)
        assert found.text == "# One & two\n\nA bold word\nnext\n\n- a\n- b\n\n  x\n    y\n\n1 | 2\n"
        assert labels(found) == ['§ "One & two"']
    latin = '<html><head><meta charset="iso-8859-2"></head><body>Łódź ąęść</body></html>'
    assert "Łódź ąęść" in read(latin.encode("iso-8859-2"), "p.html").text


def test_notebook_has_cells_with_the_beginning_of_what_they_printed() -> None:
    printed = {"output_type": "stream", "text": [f"{i}\n" for i in range(30)]}
    shown = {"output_type": "execute_result", "data": {"text/plain": "42", "image/png": "iVBORw0"}}
    failed = {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": ["long"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ""},
        {"cell_type": "code", "source": "f()", "outputs": [shown, failed]},
        {"cell_type": "code", "source": "g()", "outputs": [printed]},
    ]
    found = read(make.notebook(cells), "a.ipynb")
    assert labels(found) == ["cell 1", "cell 3", "cell 4"]
    assert found.text.startswith("[cell 1]\n# Title\ntext\n[cell 3]\nf()\nOutput:\n42\nKeyError: 'x'\n[cell 4]\ng()\n")
    assert found.text.endswith("19\n(10 more lines)\n")
    assert "iVBORw0" not in found.text
    for bad in (b"{", b"[]", b'{"cells": [1]}', b'{"cells": ' + b"[" * 100_000):
        with pytest.raises(NotText, match="damaged notebook"):
            read(bad, "a.ipynb")


def test_tables_are_sampled_and_the_rest_is_counted(tmp_path) -> None:
    rows = [f'{i},"two\nlines"' for i in range(999)]
    (tmp_path / "t.csv").write_text("\n".join(["id,text", *rows]) + "\n")
    (tmp_path / "t.jsonl").write_text("".join(f'{{"id": {i}}}\n' for i in range(201)))
    (tmp_path / "t.tsv").write_text("a\tb\n" * 200)
    documents, skips = read_documents([str(tmp_path)], OPTIONS)
    csv, jsonl, tsv = (document.text for document in documents)
    assert csv.endswith('198,"two\nlines"\n(rows 201 to 1,000 are not shown)\n')
    assert jsonl.endswith('{"id": 199}\n(rows 201 to 201 are not shown)\n')
    assert tsv == "a\tb\n" * 200
    assert skips == [
        Skip("t.csv", "rows 201 to 1,000; --all-rows reads them"),
        Skip("t.jsonl", "rows 201 to 201; --all-rows reads them"),
    ]
    documents, skips = read_documents([str(tmp_path)], ReadOptions(all_rows=True))
    assert (documents[0].text.count("\n"), skips) == (1999, [])


def test_a_program_of_the_user_s_can_print_the_text(tmp_path, nsa, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.doc").write_bytes(b"\0\0first\n" + b"\0" * 1_500_000)
    (tmp_path / "b.log").write_text("1\n2\n3\n")
    (tmp_path / "c.txt").write_text("plain\n")
    run = nsa("pack", ".", "--convert", "*.doc=tr -d '\\0' <", "--convert", "*.log=tail -n 1")
    assert (run.code, "tr failed (exit code 1)" in run.err) == (0, True), run.err
    assert run.out.endswith("=== b.log ===\n3\n=== c.txt ===\nplain\n")
    run = nsa("pack", "a.doc", "--convert", '*.doc=sh -c \'tr -d "\\\\0" < "{}"\'')
    assert (run.code, run.out) == (0, "=== a.doc ===\nfirst\n"), run.err
    run = nsa("pack", "b.log", "--convert", "*.log=false")
    assert (run.code, run.err) == (3, "nsa: b.log: false failed (exit code 1); leave it out, or name another file\n")
    for wrong in ("*.doc", "=cat", "*.doc=no-such-program", "*.doc='"):
        assert nsa("pack", ".", "--convert", wrong).code == 2
    run = nsa("pack", "-", "--convert", "*=cat", stdin="piped")
    assert (run.code, run.out) == (0, "=== <stdin> ===\npiped\n")


BOOK = """The Book

CHAPTER I.  Down the Hole
CHAPTER II. The Pool

PREFACE

A preface is a thing that nobody reads, but it is here all the same.

CHAPTER I.

Down the Hole

Alice was beginning to get very tired of sitting by her sister on the bank.
Chapter 3 says otherwise, but this line is no heading.

CHAPTER II. The Pool

"Curiouser and curiouser!" cried Alice (she was so much surprised, that she forgot).
"""


def test_chapters_of_a_plain_book() -> None:
    parts = book_parts(BOOK)
    assert [part.label for part in parts] == ['"PREFACE"', 'ch. 1 "Down the Hole"', 'ch. 2 "The Pool"']
    document = Document("alice.txt", BOOK, parts)
    assert document.cite(14, 15) == 'alice.txt:14-15 ch. 1 "Down the Hole"'
    assert document.cite(1, 2) == "alice.txt:1-2"
    assert book_parts("\nChapter 1 is all there is.\n\nIt is short.\n" * 1) == ()
    assert book_parts("def f():\n    pass\n") == ()


def test_sections_of_markdown() -> None:
    text = "---\ntitle: x\n---\n\n# One\n\n```sh\n# no heading\n```\n\nTwo\n---\n\n#### deep\n### Three ###\n"
    assert markdown_parts(text) == (Part(5, '§ "One"', 1), Part(11, '§ "Two"', 2), Part(15, '§ "Three"', 3))


RST = """====
Book
====

One
===

=====  ===
A      B
=====  ===

Deep
----

a longer title than its line
===

Three
=====

  moved in
  --------

more
text
----

Deeper
~~~~~~
"""


def test_sections_of_restructuredtext() -> None:
    parts = rst_parts(RST)
    assert parts == (Part(1, '§ "Book"', 1), Part(5, '§ "One"', 2), Part(12, '§ "Deep"', 3), Part(18, '§ "Three"', 2))
    assert read(RST.encode(), "a.rst").parts == read(RST.encode(), "a.txt").parts == parts
    assert read(b"One\n===\n", "a.txt").parts == ()  # a rule below a line may be chance


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab\n #", max_size=30), min_size=1, max_size=6), st.data())
def test_every_line_of_a_notebook_is_cited_as_the_cell_that_holds_it(sources: list[str], data) -> None:
    found = None
    if any(source.strip() for source in sources):
        found = read(make.notebook([{"source": source} for source in sources]), "n.ipynb")
    if found:
        document = Document("n.ipynb", found.text, found.parts, found.converted)
        cell = 0
        for line, text in enumerate(found.text.split("\n")[:-1], 1):
            if text.startswith("[cell "):
                cell = int(text[6:-1])
            else:
                assert text in sources[cell - 1].split("\n")
            assert document.cite(line, line) == f"n.ipynb cell {cell}"


def test_encoding_can_be_named(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("Größe 5\n".encode("cp437"))
    (tmp_path / "b.txt").write_text("ok")
    (tmp_path / "c.txt").write_bytes("größer".encode("utf-16-le"))
    documents, skips = read_documents([str(tmp_path)], ReadOptions(encoding="cp437"))
    assert (documents[0].text, [skip.path for skip in skips]) == ("Größe 5\n", ["c.txt"])
    assert read_documents([str(tmp_path / "c.txt")], ReadOptions(encoding="utf-16-le"))[0][0].text == "größer"
    _, skips = read_documents([str(tmp_path)], ReadOptions(encoding="ascii"))
    assert Skip("a.txt", "not valid ASCII as --encoding says") in skips


@pytest.mark.parametrize(
    "kind, name, text",
    [
        ("minified", "app.js", "var a=1;" * 1000),
        ("encoded", "key.txt", "-----BEGIN-----\n" + ("QUJD" * 16 + "\n") * 30),
        ("generated", "a.pb.go", "// Code generated by protoc-gen-go. DO NOT EDIT.\npackage a\n"),
        ("generated", "x.ts", "/**\n * @generated by relay\n */\nx\n"),
        ("vendored", "third_party/x.c", "int x;\n"),
    ],
)
def test_what_programs_wrote_is_left_out_with_a_reason(tmp_path, kind: str, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    (tmp_path / "prose.txt").write_text("word " * 2000)  # a paragraph a line
    documents, skips = read_documents([str(tmp_path)], OPTIONS)
    assert [document.path for document in documents] == ["prose.txt"]
    if kind != "vendored":  # found out by its text, so it has to be named
        ((skipped, reason),) = [(skip.path, skip.reason) for skip in skips]
        assert skipped == name and reason.endswith(f"; --keep {kind} reads it")
    for options in (ReadOptions(keep=(kind,)), ReadOptions(default_ignores=False)):
        assert name in [document.path for document in read_documents([str(tmp_path)], options)[0]]
    assert len(read_documents([str(tmp_path / name)], OPTIONS)[0]) == 1  # named, it is read


def test_data_within_a_text_is_cut_and_counted(tmp_path) -> None:
    data = "iVBORw0KGgo" * 200 + "=="
    line = f"![a](data:image/png;base64,{data}) and text\n"
    (tmp_path / "a.md").write_text("# Title\n\n" + "some words\n" * 300 + line)
    documents, skips = read_documents([str(tmp_path)], OPTIONS)
    assert documents[0].text.endswith("![a](data:image/png;base64,(2,202 characters of data)) and text\n")
    assert skips == [Skip("a.md", "2,202 characters of data; --keep encoded reads them")]
    for names, options in (([tmp_path], ReadOptions(keep=("encoded",))), ([tmp_path / "a.md"], OPTIONS)):
        documents, skips = read_documents([str(name) for name in names], options)
        assert (documents[0].text.endswith(line), skips) == (True, [])


def test_books_go_through_plan_pack_and_ask(nsa, tmp_path) -> None:
    (tmp_path / "book.pdf").write_bytes(make.pdf([f"the fox on page {i} runs over the dog " * 2 for i in range(1, 9)]))
    (tmp_path / "novel.epub").write_bytes(make.epub({f"{i}.xhtml": f"<h1>T{i}</h1><p>fox</p>" for i in range(3)}))
    (tmp_path / "page.html").write_text("<html><body><h1>Fox</h1><p>the dog</p></body></html>")
    (tmp_path / "a.ipynb").write_bytes(make.notebook([{"source": "the fox"}]))
    (tmp_path / "r.docx").write_bytes(make.docx(make.paragraph("the lazy dog")))
    names = ["a.ipynb", "book.pdf", "novel.epub", "page.html", "r.docx"]
    plan = nsa("plan", tmp_path, "--json")
    assert [file["path"] for file in json.loads(plan.out)["files"]] == names
    pack = nsa("pack", tmp_path)
    assert pack.code == 0
    assert "=== book.pdf ===\n[p. 1]\nthe fox on page 1" in pack.out
    ask = nsa("ask", tmp_path, "the fox?", "--json", "--max-tokens", 4, "--evidence", 20)
    assert (ask.code, "Traceback" in ask.err) == (0, False)
    evidence = json.loads(ask.out)["evidence"]
    assert evidence, "the tiny model's retrieval head prefers some blocks"
    for place in evidence:
        assert place["place"].startswith(place["path"]) and place["path"] + ":" not in place["place"]
        if place["path"] == "book.pdf":
            assert place["place"].startswith("book.pdf p. ")
