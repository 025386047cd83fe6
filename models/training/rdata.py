"""Character vectors in an R package's data (`Rdata.rdb`), read without R.

The file is a row of objects: 4 bytes for their length, then zlib around R's serialization, version 3 in XDR
(https://cran.r-project.org/doc/manuals/r-release/R-ints.html, Serialization Formats).
"""

import struct
import zlib
from collections.abc import Iterator

CHARACTER_VECTOR, STRING = 16, 9  # SEXP types, in the low byte of an item's flags


def character_vectors(data: bytes) -> Iterator[list[str]]:
    """The lines of every object that is a character vector. Raises ValueError for what is no such file."""
    while data:
        inflate = zlib.decompressobj()
        try:
            item = inflate.decompress(data[4:])
        except zlib.error as error:
            raise ValueError(f"not R data: {error}") from None
        data = inflate.unused_data
        try:
            yield from _strings(item)
        except struct.error:
            raise ValueError("not R data: cut short") from None


def _strings(item: bytes) -> Iterator[list[str]]:
    if item[:6] != b"X\n\0\0\0\3":
        raise ValueError("not R data: no XDR serialization of version 3")
    at = 14 + 4 + struct.unpack_from(">i", item, 14)[0]  # behind two versions of R and the name of an encoding
    flags, count = struct.unpack_from(">ii", item, at)
    if flags & 255 != CHARACTER_VECTOR:
        return
    at, lines = at + 8, []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", item, at)
        if flags & 255 != STRING:
            raise ValueError("not R data: a character vector holds something else")
        at += 8
        lines.append(item[at : at + max(size, 0)].decode("utf-8", "replace"))  # NA has a size of -1
        at += max(size, 0)
    yield lines
