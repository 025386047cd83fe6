"""Zip archives that may be hostile: read in memory, nothing is unpacked to disk, and sizes count as they inflate."""

import io
import posixpath
import struct
import zipfile
from urllib.parse import unquote

from nsa_cli.documents.document import NotText
from nsa_cli.units import format_bytes

MAX_DIRECTORY = 4_000_000  # bytes that list the members: some 50,000 of them
MAX_MEMBER = 32_000_000  # bytes of a member, inflated
MAX_TOTAL = 256_000_000  # bytes of all members that are read


class Archive:
    """Members by name. Raises NotText for what is damaged, encrypted, missing or too large."""

    def __init__(self, data: bytes, kind: str) -> None:
        self.kind = kind
        self.read_bytes = 0
        check_directory(data, kind)
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise NotText(f"damaged {kind} ({error})") from None
        self.names = set(self._zip.namelist())

    def read(self, name: str) -> bytes:
        """The bytes of a member; the archive's word on their number is not taken."""
        if name not in self.names:
            raise NotText(f"damaged {self.kind} ({name!r} is missing)")
        limit = min(MAX_MEMBER, MAX_TOTAL - self.read_bytes)
        try:
            with self._zip.open(name) as member:
                data = member.read(limit + 1)
        except Exception as error:  # zlib.error, BadZipFile, RuntimeError for encryption, and some more
            raise NotText(f"damaged {self.kind} ({name!r}: {error})") from None
        if len(data) > limit:
            raise NotText(f"{self.kind} of which {name!r} is over {format_bytes(limit)} when inflated")
        self.read_bytes += len(data)
        return data


def check_directory(data: bytes, kind: str) -> None:
    """Refuse a list of members that would take more memory than their texts may; zipfile reads it whole."""
    end = data.rfind(b"PK\5\6", max(len(data) - 65_557, 0))
    if end < 0 or len(data) - end < 22:
        raise NotText(f"damaged {kind} (it has no end)")
    (size,) = struct.unpack_from("<I", data, end + 12)
    if size > MAX_DIRECTORY or data[max(end - 20, 0) : end].startswith(b"PK\6\7"):
        raise NotText(f"{kind} with too many members")


def resolve(base: str, reference: str, kind: str) -> str:
    """The member that `reference`, found in the member `base`, names. Raises NotText if it leads out of the archive."""
    path = unquote(reference.partition("#")[0])
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(base), path)) if path else base
    if joined.startswith(("/", "../")) or joined == ".." or "\\" in joined or "\0" in joined:
        raise NotText(f"{kind} that refers to {reference!r}, outside of itself")
    return joined


def parse_xml(data: bytes, name: str, kind: str):
    """The root element. Raises NotText; entities that a file declares are refused (billion laughs)."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        return fromstring(data)
    except DefusedXmlException:
        raise NotText(f"{kind} whose {name!r} declares entities, as XML bombs do") from None
    except (ParseError, ValueError, LookupError) as error:
        raise NotText(f"damaged {kind} ({name!r}: {error})") from None


def local_name(element) -> str:
    """`p` for `{namespace}p`."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
