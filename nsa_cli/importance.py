"""Which files the others lean on: PageRank over definitions and the references to them."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from nsa_cli.documents import Document
from nsa_cli.documents.tags import find_tags

DAMPING = 0.85
ROUNDS = 100  # the error is at most 0.85^100, 1e-7
COMMON = 5  # files that define one name: a reference to it says little about any of them


def importance(documents: Sequence[Document]) -> list[float]:
    """A share of 1 for each document; all the same where nothing refers to anything."""
    definers: dict[str, set[int]] = defaultdict(set)
    references: list[Counter[str]] = []
    for number, document in enumerate(documents):
        tags = find_tags(document.text, document.path)
        for tag in tags:
            if tag.is_definition:
                definers[tag.name].add(number)
        references.append(Counter(tag.name for tag in tags if not tag.is_definition))
    edges: list[dict[int, float]] = []
    for number, names in enumerate(references):
        weights: dict[int, float] = defaultdict(float)
        for name, count in names.items():
            others = definers.get(name, set()) - {number}
            for other in others:
                weights[other] += weight(name, count) / len(others) / (10 if len(others) > COMMON else 1)
        edges.append(weights)
    return page_rank(edges)


def weight(name: str, count: int) -> float:
    """How much a reference tells: a long name of several words is hardly a coincidence, a private one says little."""
    several_words = len(name) >= 8 and ("_" in name.strip("_") or (name != name.lower() and name != name.upper()))
    return math.sqrt(count) * (10 if several_words else 1) * (0.1 if name.startswith("_") else 1)


def page_rank(edges: Sequence[dict[int, float]]) -> list[float]:
    """PageRank by power iteration; edges[a][b] is the weight of a's link to b. What links nowhere links everywhere."""
    count = len(edges)
    sums = [sum(weights.values()) for weights in edges]
    rank = [1 / count] * count
    for _ in range(ROUNDS):
        lost = sum(value for value, total in zip(rank, sums, strict=True) if not total)
        new = [(1 - DAMPING + DAMPING * lost) / count] * count
        for value, weights, total in zip(rank, edges, sums, strict=True):
            for other, share in weights.items():
                new[other] += DAMPING * value * share / total
        if sum(abs(a - b) for a, b in zip(rank, new, strict=True)) < 1e-9:
            break
        rank = new
    return rank
