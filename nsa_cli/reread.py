"""The passages that a question leads to, to be read once more by themselves.

A model may find in a long text what it cannot answer from there: the built-in one looked up 15 of 15 needles,
definitions and parameters in 8,192 tokens of jinja2, and answered 5 of them; of their passages by themselves, 14.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from nsa_cli.evidence import significant_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_cli.context import Context, ContextFile
    from nsa_models.retrieval import RetrievalMass

# Tokens around a block that draws attention: what is said of a word stands behind it more often than before it. With
# twice as many 3 passages fitted 896 tokens, not 5: of 24 questions about 8,192 tokens of networkx, answered at one to
# four places, 13 were right, 17 with these.
BEFORE, AFTER = 32, 64
# Tokens more, at most, to where brackets close: of 59 functions of jinja2, 10 had a signature that was cut off else.
CLOSE = 96

PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+")

Span = tuple[int, int]  # tokens [start, stop) of a context


def passages(retrieval: "RetrievalMass", context: "Context", offset: int, limit: int) -> "list[ContextFile]":
    """Passages of at most `limit` tokens, headers included, around the blocks that drew most attention, as many as fit.
    Empty where the question leads nowhere. The best comes last, nearest to the question: which file defines a name that
    other files of click (55,557 tokens) have too was right for 14 of 19 so, and for 9 in the order of the text.

    offset: tokens of the prompt before the context's first.
    """
    size = retrieval.config.evidence_block
    starts = [block * size - offset for block, _ in significant_blocks(retrieval)]
    blocks = [(start, start + size) for start in starts]
    return cut(context, best_last(around(blocks, context, limit), blocks))


def best_last(spans: Iterable[Span], blocks: Sequence[Span]) -> list[Span]:
    """The spans by the best block around which each is; blocks: the best first."""

    def best(span: Span) -> int:
        return min(rank for rank, block in enumerate(blocks) if span[0] <= max(block[0] - BEFORE, 0) < span[1])

    return sorted(spans, key=best, reverse=True)


def by_mass(parts: "Sequence[ContextFile]", mass: "Tensor", offset: int) -> "list[ContextFile]":
    """The same passages by the mass that their tokens drew, the most last.

    mass: of each token before the question; offset: tokens before the first passage. Of 55 names that other files of
    click (55,557 tokens) define or use too, the definition was last for 49 by the mass of one head in 5 passages by
    themselves, for 37 by that of four in the whole text; which file defines them was right for 52 of 60, and for 45.
    With the best alone put last, and the others left as they were, it was for 47.
    """
    bounds = accumulate((part.tokens for part in parts), initial=offset)
    drawn = [mass[start:stop].sum().item() for start, stop in pairwise(bounds)]
    return [parts[i] for i in sorted(range(len(parts)), key=drawn.__getitem__)]


def named_paths(parts: "Sequence[ContextFile]", said: str) -> set[str]:
    """The paths that an answer from these passages can know: theirs, and what they or the conversation name in the same
    folders. Others are made up: asked which file defines _waitpid, psutil/_waitpid.py for psutil/_psposix.py.
    """
    paths = {part.path for part in parts}
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    mentions = (path for text in (*(part.text for part in parts), said) for path in PATH.findall(text))
    known = (path.removeprefix("./").rstrip(".-") for path in mentions)
    return paths | {path for path in known if path.partition("/")[0] in folders}


def around(places: Sequence[Span], context: "Context", limit: int) -> list[Span]:
    """What surrounds these places: the first of them whose passages fit `limit` tokens; in order, neighbours as one."""
    spans: list[Span] = []
    for start, stop in places:
        place = max(start - BEFORE, 0), min(stop + AFTER, context.tokens)
        wider = merge([*spans, closed(place, context)])
        if sum(part.tokens for part in cut(context, wider)) > limit:
            break
        spans = wider
    return spans


def closed(span: Span, context: "Context") -> Span:
    """The same, or on to the line where all brackets close that open in it, if that is at most CLOSE tokens more."""
    file = next((file for file in context.files if file.start < span[1] <= file.stop), None)
    if file is None:  # in the listing
        return span
    body = file.start + len(file.header)
    first, last, most = (min(max(at - body, 0), len(file.body)) for at in (*span, span[1] + CLOSE))
    start, stop, end = (file.offsets[token] for token in (first, last, most))
    at = closing_bracket(file.text, start, file.text.rfind("\n", start, stop) + 1 or stop, end)
    closes = file.text.find("\n", at, end) + 1 if at is not None else 0
    return span[0], max(span[1], body + bisect_left(file.offsets, closes))


def closing_bracket(text: str, start: int, stop: int, end: int) -> int | None:
    """Where, in [stop, end), all brackets are closed that open in [start, stop); None if none are open, or stay so."""
    depth = 0
    for at in range(start, end):
        if at == stop and not depth:
            return None
        depth = max(depth + (text[at] in "([{") - (text[at] in ")]}"), 0)
        if at >= stop and not depth:
            return at
    return None


def merge(spans: Iterable[Span]) -> list[Span]:
    """In order, those that touch as one."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged


def cut(context: "Context", spans: Iterable[Span]) -> "list[ContextFile]":
    """The spans' text, file by file: whole lines, but for those that are longer than what surrounds a block."""
    within = ((file, span) for span in spans for file in context.files if span[0] < file.stop and file.start < span[1])
    return [part for file, span in within if (part := cut_file(context, file, span))]


def cut_file(context: "Context", file: "ContextFile", span: Span) -> "ContextFile | None":
    """What a span has of a file; None if that is its header alone."""
    from nsa_cli.context import encode

    body = file.start + len(file.header)
    first, last = (min(max(at - body, 0), len(file.body)) for at in span)
    start, stop = file.offsets[first], file.offsets[last]
    if first:
        line = file.text.find("\n", max(start - 1, 0), file.offsets[min(first + BEFORE, last)])
        start = line + 1 if line >= 0 else start
    if last < len(file.body):
        line = file.text.rfind("\n", file.offsets[max(last - AFTER, first)], stop)
        stop = line + 1 if line >= 0 else stop
    if start >= stop:
        return None
    return encode(file.document, context.tokenizer, file.text[start:stop], file.line_at(start))
