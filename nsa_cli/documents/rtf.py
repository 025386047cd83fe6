"""RTF -> text, with the chapters of a book."""

from nsa_cli.documents.chapters import book_parts
from nsa_cli.documents.decode import CONTROL
from nsa_cli.documents.document import Extract, NotText

MAGIC = b"{\\rtf"
MAX_RTF = 16_000_000  # bytes; reading takes some 50 times as much memory


def read_rtf(data: bytes) -> Extract:
    from striprtf.striprtf import rtf_to_text

    if len(data) > MAX_RTF:
        raise NotText(f"RTF of {len(data):,} bytes, over the limit of {MAX_RTF:,}")
    try:
        text = rtf_to_text(data.decode("latin-1"), errors="replace")
    except Exception as error:  # the library raises whatever a damaged file leads it to
        raise NotText(f"damaged RTF ({str(error) or type(error).__name__})") from None
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # it writes an emoji as its two halves
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate({ord(c): None for c in CONTROL})
    if not text.strip():
        raise NotText("RTF without text")
    return Extract(text, book_parts(text), converted=True)
