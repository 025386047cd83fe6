"""Questions about long texts with answers that are exactly known, for training and for evaluation.

Each maker takes documents that fill a context, plants what is asked for or finds it in them, and says where it is. The
haystack tasks follow RULER (arXiv 2404.06654): one needle, many keys, values and queries, variable tracking.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources

from nsa_models.text import Text
from nsa_models.training import wordings
from nsa_models.training.wordings import Wordings

ABSENT = "That is not in the text."
PLANTED = 40  # tokens, at most, of one planted line


@dataclass(frozen=True)
class Task:
    """A question about documents. An answer is right if it holds every fact; `depth`: where the first fact stands,
    0 = at the beginning, 1 = at the end; `places`: path and line of all that the answer takes, the first fact's first;
    `wordings`: of the question; `told`: the answer in the order in which texts say its facts, where it has that order.
    """

    kind: str
    documents: tuple[Text, ...]
    question: str
    answer: str
    facts: tuple[str, ...]
    depth: float
    places: tuple[tuple[str, int], ...]
    wordings: Wordings | None = None
    told: Callable[[Sequence[Text]], str] | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Of the first fact, as path:line."""
        path, line = self.places[0]
        return f"{path}:{line}"


class Unsuitable(Exception):
    """These documents hold nothing that this kind could ask for."""


Maker = Callable[[random.Random, Sequence[Text], float | None], Task]


def practised(maker: Maker, share: float) -> Maker:
    """The same, a share of it asked in the wordings that are there to practise on."""
    return _reworded(maker, lambda rng, wordings: wordings.practised(rng) if rng.random() < share else wordings.usual)


def held_out(maker: Maker) -> Maker:
    """The same, asked in the wording that is never practised."""
    return _reworded(maker, lambda rng, wordings: wordings.held_out)


def _reworded(maker: Maker, question: Callable[[random.Random, Wordings], str]) -> Maker:
    def make(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
        task = maker(rng, documents, depth)
        return task if task.wordings is None else replace(task, question=question(rng, task.wordings))

    return make


def needle(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """One planted number, asked for."""
    (name,), (number,) = _names(rng, 1), _numbers(rng, 1)
    asked, line = wordings.NEEDLE.filled(name=name), _magic(name, number)
    return _planted("needle", rng, documents, [line], depth, asked, line, (number,))


def keys(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """Eight planted numbers of eight names, one asked for."""
    names, numbers = _names(rng, 8), _numbers(rng, 8)
    lines = [_magic(*pair) for pair in zip(names, numbers, strict=True)]
    asked = wordings.NEEDLE.filled(name=names[0])
    return _planted("keys", rng, documents, lines, depth, asked, lines[0], (numbers[0],), slice(1))


def values(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """Four planted numbers of one name, all asked for."""
    (name,), numbers = _names(rng, 1), _numbers(rng, 4)
    lines = [_magic(name, number) for number in numbers]
    task = _planted("values", rng, documents, lines, depth, wordings.VALUES.filled(name=name), "", tuple(numbers))

    def told(texts: Sequence[Text]) -> str:
        whole = "".join(text.text for text in texts)
        in_order = sorted(numbers, key=lambda number: whole.index(_magic(name, number)))  # one right answer, not 24
        return f"The magic numbers of {name} are {', '.join(in_order)}."

    return replace(task, answer=told(task.documents), told=told)


def queries(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """Eight planted numbers of eight names, four asked for."""
    names, numbers = _names(rng, 8), _numbers(rng, 8)
    lines = [_magic(*pair) for pair in zip(names, numbers, strict=True)]
    asked = wordings.QUERIES.filled(names=f"{', '.join(names[:3])} and {names[3]}")
    answer, facts = " ".join(lines[:4]), tuple(numbers[:4])
    return _planted("queries", rng, documents, lines, depth, asked, answer, facts, slice(4))


def variables(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """A chain of four assignments, in order, beside another chain: which variables have the value?"""
    names = rng.sample([a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS], 8)
    value, other = _numbers(rng, 2)
    chains = [_chain(names[:4], value), _chain(names[4:], other)]
    asked = wordings.VARIABLES.filled(value=value)
    answer = f"The variables with the value {value} are {', '.join(names[:4])}."
    lines = [line for pair in zip(*chains, strict=True) for line in pair]
    one_chain = slice(None, None, 2)
    return _planted("variables", rng, documents, lines, depth, asked, answer, tuple(names[:4]), one_chain, True)


def absent(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """Three planted numbers, and a question for the number of a fourth name."""
    names, numbers = _names(rng, 4), _numbers(rng, 3)
    lines = [_magic(*pair) for pair in zip(names, numbers, strict=False)]
    asked = wordings.ABSENT.filled(name=names[3], absent=ABSENT)
    return _planted("absent", rng, documents, lines, depth, asked, ABSENT, ("not in the text",))


def plain(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """A question about no text: practice in contexts alone had the model unlearn what to say without one."""
    asked = rng.choice(_lines("plain.jsonl"))
    return Task("plain", (), asked["question"], asked["answer"], (asked["answer"],), 0.0, ())


def short_tasks() -> list[Task]:
    """Fifty short questions about no text, whose answers hold exact facts: what a model must not unlearn."""
    values = _lines("short.jsonl")
    asked = [(value["question"], tuple(value["facts"])) for value in values]
    return [
        Task("short", (), question, ", ".join(facts), facts, 0.0, (("short.jsonl", i),))
        for i, (question, facts) in enumerate(asked, 1)
    ]


def is_right(task: Task, reply: str) -> bool:
    """Whether a reply holds every fact as a whole word, letter case aside."""
    reply = reply.casefold()
    return all(re.search(rf"(?<!\w){re.escape(fact.casefold())}(?!\w)", reply) for fact in task.facts)


@cache
def _lines(name: str) -> list[dict]:
    file = resources.files("nsa_models") / "training" / name
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
_ADJECTIVES = ("amber", "brisk", "calm", "dusty", "early", "faint", "grand", "hollow", "icy", "jolly", "keen", "quiet")
_NOUNS = ("anchor", "basket", "candle", "drum", "engine", "feather", "garden", "harbour", "island", "kettle", "mirror")


def _names(rng: random.Random, count: int) -> list[str]:
    return [f"{a} {n}" for a, n in zip(rng.sample(_ADJECTIVES, count), rng.sample(_NOUNS, count), strict=True)]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(10000, 100000), count)]


def _magic(name: str, number: str) -> str:
    return f"The magic number of the {name} is {number}."


def _chain(names: Sequence[str], value: str) -> list[str]:
    return [f"VAR {name} = {source}" for name, source in zip(names, [value, *names], strict=False)]


def _planted(
    kind: str,
    rng: random.Random,
    documents: Sequence[Text],
    lines: Sequence[str],
    depth: float | None,
    asked: Wordings,
    answer: str,
    facts: tuple[str, ...],
    taken: slice = slice(None),
    in_order: bool = False,
) -> Task:
    """`lines` planted between lines of the documents: the first at `depth`, others anywhere (in order: after it). The
    answer takes `taken` of them.
    """
    depth = rng.random() if depth is None else depth
    texts = [text.text.splitlines(keepends=True) for text in documents]
    borders = [(i, j) for i, text in enumerate(texts) for j in range(len(text) + 1)]
    first = min(int(depth * len(borders)), len(borders) - 1)
    rest = [rng.randrange(first if in_order else 0, len(borders)) for _ in lines[1:]]
    where = [first, *(sorted(rest) if in_order else rest)]
    planted = sorted(zip(where, range(len(lines)), strict=True), reverse=True)
    for at, k in planted:  # from the back, so that borders before stay valid
        i, j = borders[at]
        texts[i].insert(j, lines[k] + "\n")
    made = tuple(Text(d.path, "".join(_ended(t))) for d, t in zip(documents, texts, strict=True))
    lines_in = [(line, borders[at][0]) for line, at in zip(lines, where, strict=True)]
    places = tuple((documents[i].path, texts[i].index(line + "\n") + 1) for line, i in lines_in[taken])
    return Task(kind, made, asked.usual, answer, facts, depth, places, asked)


def _ended(lines: list[str]) -> list[str]:
    """A last line without a line end gets one: nothing may be planted behind it on the same line."""
    return [line if line.endswith("\n") else line + "\n" for line in lines]
