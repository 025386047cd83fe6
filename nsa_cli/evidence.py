"""Where the model looked: the blocks that answering chose more often than chance, as path and lines."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_cli.context import Context
    from nsa_models.selection import SelectionCount

SIGNIFICANT = 2.0  # standard deviations above chance; fewer choices than that are noise


@dataclass(frozen=True)
class Evidence:
    """Lines start..end (from 1, inclusive) of a file, chosen `lift` times as often as chance."""

    path: str
    start: int
    end: int
    lift: float

    def __str__(self) -> str:
        return f"{self.path}:{self.start}-{self.end}  lift {self.lift:.1f}x"

    def to_json(self) -> dict:
        return asdict(self) | {"lift": round(self.lift, 2)}


def find_evidence(selection: "SelectionCount", context: "Context", offset: int, limit: int) -> list[Evidence]:
    """The `limit` blocks of the context with the highest lift, best first; neighbours in a file become one.

    offset: tokens of the prompt before the context's first. Attended, not proven: lift says where, not why.
    """
    size = selection.variant.select_block
    lift = smoothed_lift(selection)
    chosen = sorted(lift, key=lift.__getitem__, reverse=True)
    places = []
    for block in chosen:
        start = max(block * size - offset, 0)
        stop = min((block + 1) * size - offset, len(context.ids))
        found = context.locate(start, stop) if start < stop else []
        places += [(block, Evidence(p.path, p.first_line, p.last_line, lift[block])) for p in found]
        if len(places) >= limit:
            break
    return sorted(merge(places[:limit]), key=lambda e: -e.lift)


def smoothed_lift(selection: "SelectionCount") -> dict[int, float]:
    """Block -> lift of every block chosen significantly more often than chance.

    One choice is added to both sides, which draws blocks that were hardly open to choice towards 1.
    """
    counts, expected = selection.counts, selection.expected
    significant = counts > expected + SIGNIFICANT * expected.sqrt()
    lift = (counts + 1) / (expected + 1)
    return {block: float(lift[block]) for block in significant.nonzero().flatten().tolist()}


def merge(places: Iterable[tuple[int, Evidence]]) -> list[Evidence]:
    """Join evidence of neighbouring blocks in one file; the joint lift is the higher one."""
    merged: list[tuple[int, Evidence]] = []
    for block, e in sorted(places, key=lambda place: place[0]):  # a block's own places stay in order
        last_block, last = merged[-1] if merged else (None, None)
        if last and block == last_block + 1 and last.path == e.path:
            joint = Evidence(e.path, last.start, max(last.end, e.end), max(last.lift, e.lift))
            merged[-1] = (block, joint)
        else:
            merged.append((block, e))
    return [e for _, e in merged]
