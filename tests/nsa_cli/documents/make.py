"""Small files of every kind that a reader takes, made here: no test needs a network or a file of somebody else's."""

import io
import json
import zipfile


def archive(members: dict[str, str | bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in members.items():
            target.writestr(name, data)
    return stream.getvalue()


def pdf(pages: list[str], labels: str = "") -> bytes:
    """Pages of one line each, in Helvetica; labels: a /PageLabels entry."""
    objects = [f"<< /Type /Catalog /Pages 2 0 R {labels} >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    for i, text in enumerate(pages):
        lines = "".join(f"({line}) Tj T* " for line in text.split("\n"))
        content = f"BT /F1 12 Tf 14 TL 72 720 Td {lines}ET"
        font = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {font} /Contents {5 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    return pdf_file(objects)


def pdf_file(objects: list[str]) -> bytes:
    """Objects 1, 2, ... of which the first is the catalog."""
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + end.encode()


CONTAINER = """<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="{package}" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest>
<spine toc="ncx">{spine}</spine></package>"""


def epub(chapters: dict[str, str], toc: dict[str, str] | str = "", **extra: str | bytes) -> bytes:
    """chapters: member -> HTML body. toc: the whole toc.ncx or nav's name -> data. extra: more members."""
    items = [f'<item id="i{i}" href="{name}" media-type="application/xhtml+xml"/>' for i, name in enumerate(chapters)]
    members = {"META-INF/container.xml": CONTAINER.format(package="OEBPS/book.opf")}
    if toc:
        items.append('<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>')
        members["OEBPS/toc.ncx"] = toc
    spine = "".join(f'<itemref idref="i{i}"/>' for i in range(len(chapters)))
    members["OEBPS/book.opf"] = PACKAGE.format(items="".join(items), spine=spine)
    for name, body in chapters.items():
        page = f"<html><head><title>t</title></head><body>{body}</body></html>"
        members[f"OEBPS/{name}"] = f'<?xml version="1.0"?><!DOCTYPE html>{page}'
    return archive(members | extra)


def ncx(points: list[tuple[str, str]]) -> str:
    entries = "".join(
        f"<navPoint><navLabel><text>{title}</text></navLabel><content src='{target}'/></navPoint>"
        for title, target in points
    )
    return f'<?xml version="1.0"?><ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap>{entries}</navMap></ncx>'


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
STYLES = f"""<w:styles {W}><w:style w:styleId="H1"><w:name w:val="heading 1"/></w:style>
<w:style w:styleId="H2"><w:name w:val="Heading 2"/></w:style></w:styles>"""


def docx(body: str, **extra: str | bytes) -> bytes:
    document = f'<?xml version="1.0"?><w:document {W}><w:body>{body}</w:body></w:document>'
    return archive({"word/document.xml": document, "word/styles.xml": STYLES} | extra)


def paragraph(text: str, style: str = "") -> str:
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{properties}<w:r><w:t>{text}</w:t></w:r></w:p>"


def notebook(cells: list[dict]) -> bytes:
    return json.dumps({"nbformat": 4, "cells": cells}).encode()
