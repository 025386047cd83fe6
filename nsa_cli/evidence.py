"""Where a question leads: the blocks that drew its words' attention, as path and lines."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_cli.context import Context
    from nsa_models.retrieval import RetrievalMass

SIGNIFICANT = 2.0  # times an even share; less is chance

# Words that every question has lead to every other question: without them the definition of a named function was among
# the best five blocks for 76 of 80 questions about 109,000 tokens, with them for 68 ("Where is X defined?" led to
# comments that begin with Where).
# fmt: off
FUNCTION_WORDS = frozenset((
    "a", "about", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "could", "did", "do",
    "does", "for", "from", "had", "has", "have", "he", "here", "how", "i", "if", "in", "into", "is", "it",
    "its", "may", "me", "might", "must", "my", "not", "of", "on", "or", "our", "she", "should", "than", "that",
    "the", "their", "them", "then", "there", "these", "they", "this", "those", "to", "us", "was", "we", "were",
    "what", "when", "where", "which", "who", "whom", "whose", "why", "will", "with", "would", "you", "your",
))
# fmt: on


@dataclass(frozen=True)
class Evidence:
    """Lines start..end (from 1, inclusive) of a file; lift: their attention over an even share."""

    path: str
    start: int
    end: int
    lift: float
    place: str = field(default="", compare=False)  # as people cite it: `a.py:3-9`, `book.pdf p. 41`

    def __str__(self) -> str:
        return f"{self.place}  lift {self.lift:.1f}x"

    def to_json(self) -> dict:
        return asdict(self) | {"lift": round(self.lift, 2)}


def counted_tokens(text: str, starts: Sequence[int]) -> list[bool]:
    """Which tokens of a question, by the character each starts with, belong to a word that says what is asked about.

    If it has none, every token.
    """
    words = [m.span() for m in re.finditer(r"\w+", text) if m[0].lower() not in FUNCTION_WORDS]
    counted = []
    for start, stop in pairwise([*starts, len(text)]):
        stop = max(stop, start + 1)  # several tokens may be the bytes of one character
        counted.append(any(first < stop and start < last for first, last in words))
    return counted if any(counted) else [True] * len(starts)


def significant_blocks(retrieval: "RetrievalMass") -> list[tuple[int, float]]:
    """Blocks that drew more attention than chance gives, and their lift, the best first."""
    found = [(block, lift) for block, lift in enumerate(retrieval.lift.tolist()) if lift > SIGNIFICANT]
    return sorted(found, key=lambda block: -block[1])


def find_evidence(retrieval: "RetrievalMass", context: "Context", offset: int, limit: int) -> list[Evidence]:
    """The `limit` places that drew most attention, if more than chance gives; neighbours in a file become one.

    offset: tokens of the prompt before the context's first. Attended, not proven: lift says where, not why.
    """
    size = retrieval.config.evidence_block
    blocks: list[tuple[int, Evidence]] = []
    places: list[Evidence] = []
    for block, lift in significant_blocks(retrieval):
        start = max(block * size - offset, 0)
        stop = min((block + 1) * size - offset, len(context.ids))
        found = context.locate(start, stop) if start < stop else []
        blocks += [(block, Evidence(p.path, p.first_line, p.last_line, lift)) for p in found]
        places = cite(merge(blocks), context)
        if len(places) > limit:
            break
    return places[:limit]


def cite(found: Sequence[Evidence], context: "Context") -> list[Evidence]:
    """Evidence with the place that people know it by; two blocks of one page are one place to look."""
    cited: dict[str, Evidence] = {}
    for e in found:
        place = context.cite(e.path, e.start, e.end)
        cited.setdefault(place, replace(e, place=place))
    return list(cited.values())


def merge(blocks: Sequence[tuple[int, Evidence]]) -> list[Evidence]:
    """Join evidence of neighbouring blocks in one file, at the rank and with the lift of the better one."""
    ranked = {(block, e.path): rank for rank, (block, e) in enumerate(blocks)}
    merged: list[tuple[int, int, Evidence]] = []  # rank, last block, evidence
    for block, e in sorted(blocks, key=lambda found: found[0]):  # a block's own places stay in order
        rank = ranked[block, e.path]
        if merged and block == merged[-1][1] + 1 and merged[-1][2].path == e.path:
            best, _, last = merged[-1]
            joint = Evidence(e.path, last.start, max(last.end, e.end), max(last.lift, e.lift))
            merged[-1] = (min(best, rank), block, joint)
        else:
            merged.append((rank, block, e))
    return [e for _, _, e in sorted(merged, key=lambda item: item[0])]
