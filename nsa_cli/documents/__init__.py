"""Bytes on disk -> documents: which files are read, as which text, and why the others are not."""

from nsa_cli.documents.document import Document, ReadOptions, Skip
from nsa_cli.documents.read import read_documents

__all__ = ["Document", "ReadOptions", "Skip", "read_documents"]
