"""Definitions and references in source code, by tree-sitter and the tags queries that come with its grammars."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from nsa_cli.documents.readers import suffix_of

# Suffix -> (grammar's module, its function, modules whose tags queries are asked).
_JS = ("tree_sitter_javascript", "language", ("tree_sitter_javascript",))
_TS = ("tree_sitter_javascript", "tree_sitter_typescript")
_C, _CPP = ("tree_sitter_c", "language", ("tree_sitter_c",)), ("tree_sitter_cpp", "language", ("tree_sitter_cpp",))
_RUBY, _PYTHON = (
    ("tree_sitter_ruby", "language", ("tree_sitter_ruby",)),
    ("tree_sitter_python", "language", ("tree_sitter_python",)),
)
LANGUAGES = {
    **dict.fromkeys((".py", ".pyi"), _PYTHON),
    **dict.fromkeys((".js", ".jsx", ".mjs", ".cjs"), _JS),
    **dict.fromkeys((".ts", ".mts", ".cts"), ("tree_sitter_typescript", "language_typescript", _TS)),
    ".tsx": ("tree_sitter_typescript", "language_tsx", _TS),
    ".go": ("tree_sitter_go", "language", ("tree_sitter_go",)),
    ".rs": ("tree_sitter_rust", "language", ("tree_sitter_rust",)),
    ".java": ("tree_sitter_java", "language", ("tree_sitter_java",)),
    **dict.fromkeys((".c", ".h"), _C),
    **dict.fromkeys((".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh"), _CPP),
    ".rb": _RUBY,
    ".php": ("tree_sitter_php", "language_php", ("tree_sitter_php",)),
}
COMMENTS = ("comment", "line_comment", "block_comment")  # what grammars call them
MAX_SIGNATURE = 6  # lines


@dataclass(frozen=True)
class Tag:
    """A name that is defined or referred to; the lines (from 1) of a definition's head, up to its body."""

    name: str
    is_definition: bool
    first_line: int
    last_line: int


def find_tags(text: str, path: str) -> list[Tag]:
    """In the order of the text; [] for a language that no grammar here knows."""
    suffix = suffix_of(path)
    if suffix not in LANGUAGES:
        return []
    parser, query = _language(suffix)
    from tree_sitter import QueryCursor

    data = text.encode("utf-8", "replace")
    matches = QueryCursor(query).matches(parser.parse(data).root_node)
    tags = {tag for _, captures in matches for tag in _tags(captures, data)}
    return sorted(tags, key=lambda tag: (tag.first_line, tag.last_line, tag.name))


def find_comments(text: str, path: str) -> list[tuple[int, int]] | None:
    """The bytes of the text in UTF-8 that comments take; None for a language that no grammar here knows."""
    suffix = suffix_of(path)
    if suffix not in LANGUAGES:
        return None
    parser, _ = _language(suffix)
    from tree_sitter import Query, QueryCursor

    kinds = [kind for kind in COMMENTS if parser.language.id_for_node_kind(kind, True) is not None]
    query = Query(parser.language, " ".join(f"({kind}) @comment" for kind in kinds))
    root = parser.parse(text.encode("utf-8", "replace")).root_node
    return [(node.start_byte, node.end_byte) for node in QueryCursor(query).captures(root).get("comment", ())]


@cache
def _language(suffix: str):
    from tree_sitter import Language, Parser, Query

    module, function, queries = LANGUAGES[suffix]
    language = Language(getattr(importlib.import_module(module), function)())
    return Parser(language), Query(language, "\n".join(importlib.import_module(name).TAGS_QUERY for name in queries))


def _tags(captures: dict, data: bytes) -> Iterator[Tag]:
    kinds = [kind for kind in captures if kind.startswith(("definition.", "reference."))]
    for name in captures.get("name", ()) if kinds else ():
        node = captures[kinds[0]][0]
        spelling = data[name.start_byte : name.end_byte].decode("utf-8", "replace")
        if kinds[0].startswith("reference."):
            yield Tag(spelling, False, name.start_point[0] + 1, name.end_point[0] + 1)
        else:
            yield Tag(spelling, True, *_head(node, name, data))


def _head(node, name, data: bytes) -> tuple[int, int]:
    """The lines of a definition from its start to its body; a body on a line of its own is not among them."""
    first, last = node.start_point[0], node.end_point[0]
    body = node.child_by_field_name("body")
    if body is not None:
        row, column = body.start_point
        line_start = body.start_byte - column
        alone = not data[line_start : body.start_byte].strip()
        last = row - alone
    last = max(min(last, first + MAX_SIGNATURE - 1), first, name.end_point[0])
    return first + 1, last + 1
