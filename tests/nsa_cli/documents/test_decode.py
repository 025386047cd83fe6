"""Bytes to text: encodings, marks, line ends, and what is no text."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.documents.decode import NotText, decode

JAPANESE = "日本語のテキストです。これはテストです。\n"
# No NUL: without a mark, UTF-16 and UTF-32 are told from binary by nothing else.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"))


@given(TEXT)
def test_utf_8_and_marked_texts_come_back(text: str) -> None:
    if not text.startswith("\ufeff"):
        assert decode(b"\xef\xbb\xbf" + text.encode()) == text
        assert decode(text.encode("utf-16")) == text
        assert decode(b"\xfe\xff" + text.encode("utf-16-be")) == text
        assert decode(text.encode("utf-32")) == text
        assert decode(("# " + text).encode()) == "# " + text


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("Café", "latin-1"),
        ("# Größe der Fläche über Maß\nx = 1\n", "latin-1"),
        ("Café crème à la carte, s'il vous plaît", "latin-1"),
        ("He said “hello” – it’s fine.", "cp1252"),
        ("Příliš žluťoučký kůň úpěl ďábelské ódy.", "cp1250"),
        ("Это русский текст для проверки.", "cp1251"),
        ("Это русский текст для проверки кодировки.", "koi8_r"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        ("# 設定ファイル\nx = 1  # 初期値\n", "shift_jis"),
        ("这是一个中文文本文件,用于测试编码检测。", "gb18030"),
        ("한국어 텍스트 파일입니다.", "euc_kr"),
    ],
)
def test_legacy_encodings_are_recognized(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == text


def test_line_ends_become_line_feeds() -> None:
    assert decode(b"a\r\nb\rc\nd\r\n") == "a\nb\nc\nd\n"
    assert decode("a\r\nb".encode("utf-16")) == "a\nb"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"%PDF-1.7\nplain", "binary (PDF)"),
        (b"\x89PNG\r\n\x1a\n\0\0", "binary (PNG image)"),
        (b"PK\x03\x04\0\0", "binary (zip archive)"),
        (b"text and\0more", "binary"),
        (b"a" * 9000 + b"\0", "binary"),
        (b"\xff\xfea", "not valid UTF-16 in spite of its byte order mark"),
        (random.Random(0).randbytes(2000).replace(b"\0", b"\1"), "not UTF-8, and no other encoding fits"),
    ],
)
def test_what_is_no_text_says_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(NotText) as error:
        decode(data)
    assert str(error.value) == reason
