"""PDF -> text, page by page."""

import io
import logging
from collections.abc import Iterator

from nsa_cli.documents.document import Extract, NotText, assemble

MAX_TEXT = 64_000_000  # characters; the library itself bounds what streams inflate to and what a page may draw


def read_pdf(data: bytes) -> Extract:
    """Pages as `p. 41`, counted from 1; with the number printed on it where the file says another: `p. 14 (xii)`."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports on stderr what it could mend
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise NotText("PDF that needs a password")
        extract = assemble(pages(reader))
    except NotText:
        raise
    except MemoryError:
        raise NotText("PDF that inflates to more than memory holds") from None
    except Exception as error:  # the library raises whatever a damaged file leads it to
        raise NotText(f"damaged PDF ({str(error) or type(error).__name__})") from None
    if not extract.text:
        raise NotText("PDF without text: scanned pages need OCR first")
    return extract


def pages(reader) -> Iterator[tuple[str, str]]:
    labels = page_labels(reader)
    characters = 0
    for number, page in enumerate(reader.pages, 1):
        # Lone surrogates come from broken font tables, and no encoding takes them.
        text = page.extract_text().encode("utf-8", "replace").decode().replace("\r", "\n")
        characters += len(text)
        if characters > MAX_TEXT:
            raise NotText(f"PDF with more than {MAX_TEXT:,} characters")
        label = labels[number - 1] if number <= len(labels) else str(number)
        yield f"p. {number}" + (f" ({label})" if label and label != str(number) else ""), text


def page_labels(reader) -> list[str]:
    try:
        return list(reader.page_labels)
    except Exception:  # damaged labels: the count will do
        return []
