"""Bytes -> text, or the reason why not."""

import codecs

from nsa_cli.documents.document import NotText

# The four-byte marks first: UTF-16's little-endian mark is a prefix of UTF-32's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Formats that may hold no NUL byte, or whose name helps more than "binary".
MAGIC = (
    (b"%PDF-", "PDF"),
    (b"\x89PNG", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GIF8", "GIF image"),
    (b"PK\x03\x04", "zip archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"BZh", "bzip2 archive"),
    (b"\xfd7zXZ", "xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip archive"),
    (b"\x28\xb5\x2f\xfd", "zstd archive"),
    (b"\x7fELF", "program"),
    (b"OggS", "Ogg media"),
    (b"ID3", "MP3 audio"),
)
LEGACY = [
    *("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
]
# Short western text fits these too, and charset-normalizer tries them first.
CENTRAL_EUROPEAN = ("cp1250", "cp1254", "cp1257")
CONTROL = frozenset(map(chr, [*range(0x08), *range(0x0E, 0x1B), *range(0x7F, 0xA0)]))


def decode(data: bytes, encoding: str | None = None) -> str:
    """The text of `data` without byte order mark, its line ends as \\n; `encoding` where no mark says another.

    Raises NotText.
    """
    return _decode(data, encoding).replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, encoding: str | None) -> str:
    for mark, marked in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _strict(data, marked, "in spite of its byte order mark")
    for magic, kind in MAGIC:
        if data.startswith(magic):
            raise NotText(f"binary ({kind})")
    if encoding:
        return _strict(data, encoding, "as --encoding says")
    if b"\0" in data:
        raise NotText("binary")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _guess(data)


def _strict(data: bytes, encoding: str, where: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeError:
        raise NotText(f"not valid {encoding.removesuffix('-sig').upper()} {where}") from None
    if "\0" in text:
        raise NotText("binary")
    return text


def _guess(data: bytes) -> str:
    """charset-normalizer's best match among what text files are really written in."""
    from charset_normalizer import from_bytes

    matches = from_bytes(data, cp_isolation=LEGACY)
    best = matches.best()
    if best is not None and best.encoding in CENTRAL_EUROPEAN:
        best = next((m for m in matches if "cp1252" in m.could_be_from_charset), best)
    if best is None or not CONTROL.isdisjoint(str(best)):
        raise NotText("not UTF-8, and no other encoding fits")
    return str(best)
