"""What a recipe expects of its answer, checked."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_cli.reply import Answer


def failed_checks(expect: Mapping[str, object], reply: "Answer") -> list[str]:
    """In words, each expectation (recipe_keys.EXPECT) that the answer does not meet."""
    return list(_failed(expect, reply))


def _failed(expect: Mapping[str, object], reply: "Answer") -> Iterator[str]:
    text, folded = reply.text, reply.text.casefold()
    words = len(text.split())
    if words < expect.get("min_words", 0):
        yield f"{words} words, at least {expect['min_words']} expected"
    if words > expect.get("max_words", words):
        yield f"{words} words, at most {expect['max_words']} expected"
    for wanted in expect.get("contains", ()):
        if wanted.casefold() not in folded:
            yield f"{wanted!r} is not in the answer"
    for unwanted in expect.get("excludes", ()):
        if unwanted.casefold() in folded:
            yield f"{unwanted!r} is in the answer"
    if "matches" in expect and not re.search(expect["matches"], text):
        yield f"nothing in the answer matches {expect['matches']}"
    if expect.get("complete") and reply.finish_reason != "stop":
        yield f"the answer was cut ({reply.finish_reason})"
    yield from _failed_citations(expect.get("citations", {}), reply)


def _failed_citations(expect: Mapping[str, float], reply: "Answer") -> Iterator[str]:
    count, found = len(reply.citations), sum(citation.found for citation in reply.citations)
    if count < expect.get("min", 0):
        yield f"{count} citations, at least {expect['min']} expected"
    if found < expect.get("verified", 0) * count:
        yield f"{found} of {count} citations are in the text, a share of {expect['verified']:g} expected"
