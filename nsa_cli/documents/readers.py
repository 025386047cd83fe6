"""Which reader a file takes: by its first bytes, else by its name."""

from collections.abc import Callable
from pathlib import PurePosixPath

from nsa_cli.documents.archive import Archive
from nsa_cli.documents.chapters import markdown_parts, plain_parts, rst_parts
from nsa_cli.documents.decode import decode
from nsa_cli.documents.document import Extract, NotText, ReadOptions
from nsa_cli.documents.docx import read_docx
from nsa_cli.documents.epub import read_epub
from nsa_cli.documents.html import SNIFF, declared_encoding, read_html
from nsa_cli.documents.notebook import read_notebook
from nsa_cli.documents.pdf import read_pdf
from nsa_cli.documents.rtf import MAGIC as RTF
from nsa_cli.documents.rtf import read_rtf
from nsa_cli.documents.table import read_csv, read_lines, read_tsv

# A member that only this kind of archive has -> its reader.
ARCHIVES = {"META-INF/container.xml": ("EPUB", read_epub), "word/document.xml": ("DOCX", read_docx)}
TABLES = {".csv": read_csv, ".tsv": read_tsv, ".tab": read_tsv, ".jsonl": read_lines, ".ndjson": read_lines}
TEXTS: dict[str, Callable[[str], Extract]] = {
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".ipynb": read_notebook,
    **dict.fromkeys((".md", ".markdown", ".mdx"), lambda text: Extract(text, markdown_parts(text))),
    ".rst": lambda text: Extract(text, rst_parts(text)),
    **dict.fromkeys((".txt", ".text", ""), lambda text: Extract(text, plain_parts(text))),
}
BOOKS = frozenset((".pdf", ".epub", ".docx", ".rtf"))  # their bytes are not text: another limit of size
PROSE = frozenset((".txt", ".text", ".md", ".markdown", ".rst", ".tex", "", *BOOKS, *TABLES))  # long lines are theirs


def suffix_of(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def extract(data: bytes, path: str, options: ReadOptions) -> Extract:
    """The text of a file. Raises NotText with the reason if it has none."""
    if data.startswith(b"%PDF-"):
        return read_pdf(data)
    if data.startswith(b"PK\x03\x04"):
        return read_archive(data)
    if data.startswith(RTF):
        return read_rtf(data)
    suffix = suffix_of(path)
    if suffix == "" and SNIFF.match(data[:2000]):
        suffix = ".html"
    text = decode(data, options.encoding or (declared_encoding(data) if TEXTS.get(suffix) is read_html else None))
    if suffix in TABLES and not options.all_rows:
        return TABLES[suffix](text)
    return TEXTS[suffix](text) if suffix in TEXTS else Extract(text)


def read_archive(data: bytes) -> Extract:
    archive = Archive(data, "zip archive")
    for member, (kind, reader) in ARCHIVES.items():
        if member in archive.names:
            archive.kind = kind
            return reader(archive)
    raise NotText("binary (zip archive)")
