"""Documents -> a context that fits: in which order, in how much detail, and what goes where it is too much."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from nsa_cli.context import Context, ContextFile, Grid, arrange, check_budget, encode
from nsa_cli.documents import Document, Skip
from nsa_cli.documents.ignore import Rules
from nsa_cli.documents.walk import matched
from nsa_cli.order import ORDERS, in_order, preferences, priorities
from nsa_cli.output import warn
from nsa_cli.settings import cache_dir
from nsa_cli.token_cache import TokenCache

if TYPE_CHECKING:
    from nsa_cli.checkpoint import Checkpoint
    from nsa_cli.request import Request
    from nsa_models.tokenizer import Tokenizer

__all__ = [
    "LEVELS",
    "ORDERS",
    "OVERFLOWS",
    "Packing",
    "pack",
    "pack_documents",
    "reads_in_parts",
    "room_beside",
    "tree",
]

LEVELS = ("full", "code", "outline", "name")
OVERFLOWS = ("error", "shard", "outline", "drop")


@dataclass(frozen=True)
class Packing:
    """How documents become a context."""

    order: str = "path"
    prefer: tuple[str, ...] = ()  # .gitignore patterns of what matters most, the most important first
    levels: tuple[tuple[str, str], ...] = ()  # (.gitignore pattern, level); the first that matches counts
    overflow: str | None = None  # None = error, or shard where the command reads in parts
    reserve: int | None = None  # tokens to keep free for question and answer, if they take less
    align: bool = False  # files begin at a block of the model's


def reads_in_parts(packing: Packing) -> Packing:
    """For what reads what does not fit in parts, unless something else is asked for."""
    return replace(packing, overflow=packing.overflow or "shard")


def pack(
    documents: Sequence[Document],
    skips: Sequence[Skip],
    checkpoint: "Checkpoint",
    question: str,
    request: "Request",
    packing: Packing,
) -> Context:
    """The context that a question about `documents` reads. Raises BudgetError where the policy leaves it too long;
    with overflow `shard` it may be, and is to be read in parts.
    """
    room = room_beside(checkpoint, question, request, packing)
    before = len(checkpoint.tokenizer.prompt(question, request.system).before)
    grid = Grid(checkpoint.config.select_block, before)
    with TokenCache(cache_dir() if request.store in ("use", "refresh") else None, checkpoint.tokenizer) as tokens:
        context = pack_documents(documents, skips, tokens, packing, room, grid)
    context = replace(context, tokenizer=checkpoint.tokenizer)
    if packing.overflow != "shard":
        check_budget(context.tokens, room, context.files)
    return context


def room_beside(checkpoint: "Checkpoint", question: str, request: "Request", packing: Packing) -> int:
    """Document tokens that fit beside the question and the answer, and beside what is to be kept free."""
    from nsa_cli.budget import document_room, most_tokens

    room = document_room(checkpoint, question, request)
    return min(room, most_tokens(checkpoint, request) - (packing.reserve or 0))


def pack_documents(
    documents: Sequence[Document],
    skips: Sequence[Skip],
    tokenizer: "Tokenizer",
    packing: Packing,
    room: int,
    grid: Grid | None = None,
) -> Context:
    """The context of `documents`; with overflow `outline` or `drop` one of at most `room` tokens, if that can be.

    What is outlined or dropped for that is warned of by name, and is among the context's skips. The other policies
    leave what is too long as it is, for the caller to refuse or to split.
    """
    documents = in_order([at_level(d, packing.levels) for d in documents], packing.order, packing.prefer)
    read = [document for document in documents if document.level != "name"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = dict(zip(map(id, read), pool.map(lambda d: encode(d, tokenizer), read), strict=True))
    packed = Packed(documents, files, list(skips), tokenizer, grid if packing.align else None)
    context = packed.context()
    if context.tokens <= room or packing.overflow not in ("outline", "drop"):
        return context
    ranks = zip(preferences(documents, packing.prefer), priorities(documents, packing.order), strict=True)
    ranked = sorted(zip(ranks, documents, strict=True), key=lambda item: item[0])
    candidates = [document for _, document in ranked if document.level != "name"]  # the least important first
    shrink = packed.outline if packing.overflow == "outline" else packed.drop
    return shrink(candidates, room)


def at_level(document: Document, levels: Sequence[tuple[str, str]]) -> Document:
    """A document in the detail that the first matching pattern says."""
    path = document.path.lstrip("/")
    level = next((level for pattern, level in levels if matched(Rules().adding("", [pattern]), path)), "full")
    if level == "code":
        from nsa_cli.documents.bare import bare

        return bare(document)
    return document if level == "full" else outlined(document) if level == "outline" else replace(document, level=level)


def outlined(document: Document) -> Document:
    """Its outline; only its name where nothing in it can be outlined."""
    from nsa_cli.documents.outline import outline

    return outline(document) or replace(document, level="name")


@dataclass
class Packed:
    """A selection of documents, encoded."""

    documents: list[Document]
    files: dict[int, ContextFile]  # by the id of their document
    skips: list[Skip]
    tokenizer: "Tokenizer"
    grid: Grid | None

    def context(self) -> Context:
        files = [self.files[id(d)] for d in self.documents if d.level != "name"]
        return arrange(self.documents, files, self.tokenizer, self.skips, self.grid)

    def drop(self, candidates: list[Document], room: int) -> Context:
        """Keep what matters most: every file, from the most important on, that still fits beside those before it; and
        what is only named, unless the names leave no room for a file.
        """
        whole = self.documents
        named = [d for d in whole if d.level == "name"]
        kept = self.fitting(candidates, named, room) or self.fitting(candidates, [], room)
        if not kept:
            return self.context()
        self.documents = [d for d in whole if id(d) in kept]
        gone = [d for d in whole if id(d) not in kept]
        self.report("left out", gone, [file.tokens if (file := self.files.get(id(d))) else 0 for d in gone], room)
        return self.context()

    def fitting(self, candidates: list[Document], named: list[Document], room: int) -> set[int]:
        """The ids of `named` and of the candidates that fit beside them; none if no candidate does."""
        whole = self.documents
        target = room - sum(map(self.cost, named)) - len(self.tokenizer.encode("Files:\n\n"))
        if self.grid:
            target -= self.grid.block * len(whole) // 2
        while True:
            kept, left = set(), target
            for document in reversed(candidates):
                if (cost := self.cost(document)) <= left:
                    kept.add(id(document))
                    left -= cost
            if not kept:
                return kept
            beside = kept | set(map(id, named))
            tokens = replace(self, documents=[d for d in whole if id(d) in beside]).context().tokens
            if tokens <= room:
                return beside
            target -= tokens - room  # a list of names takes other tokens than its names, and so does the grid

    def cost(self, document: Document) -> int:
        """Tokens of a document and of its name in the list of files."""
        file = self.files.get(id(document))
        return (file.tokens if file else 0) + len(self.tokenizer.encode(document.path + "\n"))

    def outline(self, candidates: list[Document], room: int) -> Context:
        """Outline what matters least, file after file, until the rest fits whole."""
        total = self.context().tokens
        shrunk: list[Document] = []
        saved: list[int] = []
        for document in candidates:
            if total - sum(saved) <= room and (context := self.context()).tokens <= room:
                break
            if document.level == "outline" or (new := outlined(document)) == document:
                continue
            before = self.files[id(document)].tokens
            file = encode(new, self.tokenizer) if new.level != "name" else None
            if file and file.tokens >= before:
                continue
            self.documents = [new if d is document else d for d in self.documents]
            self.files[id(new)] = file
            shrunk.append(new)
            saved.append(before - (file.tokens if file else 0))
        context = self.context()
        if context.tokens > room:
            return context
        self.report("outlined", shrunk, saved, room)
        return self.context()

    def report(self, verb: str, documents: list[Document], tokens: list[int], room: int) -> None:
        """Say which documents are not there, or not whole, and count them among the skips."""
        counts = {d.path: count for d, count in sorted(zip(documents, tokens, strict=True), key=lambda p: p[0].path)}
        self.skips += [Skip(path, f"{verb} to fit: {count:,} tokens") for path, count in counts.items()]
        others = {file.path for file in self.context().files} - counts.keys()
        if counts:
            warn(f"{verb} to fit {room:,} tokens: {', '.join(whole_directories(counts, others))}")


def whole_directories(counts: dict[str, int], others: set[str]) -> list[str]:
    """`src/a.py (120)`, and `docs/ (12 files, 3,400)` for a directory all of whose files are counted."""
    shared = {str(parent) for path in others for parent in PurePosixPath(path).parents}
    groups: dict[str, list[int]] = {}
    for path, count in counts.items():
        parents = [str(parent) for parent in PurePosixPath(path).parents if parent.name and str(parent) not in shared]
        groups.setdefault(parents[-1] + "/" if parents else path, []).append(count)
    return [
        f"{name} ({len(found):,} files, {sum(found):,})" if len(found) > 1 else f"{name} ({sum(found):,})"
        for name, found in groups.items()
    ]


def tree(files: Sequence[ContextFile], depth: int) -> Iterator[tuple[int, str]]:
    """(tokens, indented name) of directories down to `depth`, and of files above that, the largest first."""
    yield from _branch([(file.path.split("/"), file.tokens) for file in files], depth, "")


def _branch(entries: list[tuple[list[str], int]], depth: int, indent: str) -> Iterator[tuple[int, str]]:
    groups: dict[tuple[str, bool], list[tuple[list[str], int]]] = {}
    for names, tokens in entries:
        groups.setdefault((names[0], len(names) > 1), []).append((names[1:], tokens))
    for (name, is_directory), inside in sorted(groups.items(), key=lambda item: (-sum(t for _, t in item[1]), item[0])):
        yield sum(tokens for _, tokens in inside), indent + name + "/" * is_directory
        if is_directory and depth > 1:
            yield from _branch(inside, depth - 1, indent + "  ")
