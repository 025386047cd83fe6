"""Questions about what stands in texts anyway: definitions in Python, sections and sentences in prose, entries.

Only what occurs once is asked for, so that the answer is exact. Nothing is parsed: passages are cut anywhere.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nsa_models.text import Text
from nsa_models.training.tasks import Task, Unsuitable


@dataclass(frozen=True)
class Find:
    """Something to ask for: where it stands, the question about it, its answer and the answer's facts."""

    text: Text
    at: int  # characters from the text's beginning
    question: str
    answer: str
    facts: tuple[str, ...]


def defines(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """Which file defines a function or class that the texts define once."""
    finds = (
        d.ask(f"Which file defines {d.name}? Answer with its path.", f"{d.text.path} defines {d.name}.", d.text.path)
        for d in definitions(documents)
    )
    return _chosen("defines", rng, documents, finds, depth)


def takes(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The parameters of a function that the texts define once."""
    finds = (
        d.ask(
            f"What are the parameters of the function {d.name}? Answer with their names.",
            f"{d.name} takes {', '.join(d.parameters)}.",
            *d.parameters,
        )
        for d in definitions(documents)
        if d.is_function and 1 <= len(d.parameters) <= 6
    )
    return _chosen("takes", rng, documents, finds, depth)


def returns(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The type that a function's signature says it returns."""
    finds = (
        d.ask(
            f"What type does the function {d.name} return? Answer with the type of its signature.",
            f"{d.name} returns {d.returned}.",
            d.returned,
        )
        for d in definitions(documents)
        if d.returned not in (None, "None") and len(d.returned) <= 40
    )
    return _chosen("returns", rng, documents, finds, depth)


def raises(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The exceptions that a function's body raises by name."""
    finds = (
        d.ask(
            f"Which exceptions does the function {d.name} raise? Answer with their names.",
            f"{d.name} raises {', '.join(d.raised)}.",
            *d.raised,
        )
        for d in definitions(documents)
        if d.is_function and 1 <= len(d.raised) <= 3
    )
    return _chosen("raises", rng, documents, finds, depth)


def summary(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The sentence that sums something up: of a definition's docstring, a section's lead, a manual page's NAME line."""

    def finds() -> Iterator[Find]:
        for d in definitions(documents):
            if d.summary:
                kind = "function" if d.is_function else "class"
                question = f"What does the {kind} {d.name} do? Answer with the sentence that its docstring says."
                yield d.ask(question, d.summary + ".", d.summary)
        for text, heading in _sections(documents):
            lead = _LEAD.match(text.text, heading.end())
            if lead:
                said = " ".join(lead[1].split())
                question = f'What is the section "{_title(heading)}" about? Answer with its first sentence.'
                yield Find(text, heading.start(), question, said, (said.rstrip("."),))
        for text in documents:
            for match in _NAME_LINE.finditer(text.text):
                question = f"What is {match[1]}? Answer with the line under NAME."
                yield Find(text, match.start(1), question, match[2], (match[2],))

    return _chosen("summary", rng, documents, finds(), depth)


def chapter(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """A line of prose: under which heading does it stand?"""

    def finds() -> Iterator[Find]:
        times = Counter(line.strip() for text in documents for line in text.text.splitlines())
        for text, heading in _sections(documents):
            for line in _SENTENCE.finditer(text.text, heading.end(), _end_of_section(text, heading)):
                if times[line[0].strip()] == 1:
                    question = f'Under which heading does it say "{line[0].strip()}"? Answer with the heading.'
                    title = _title(heading)
                    yield Find(text, line.start(), question, f'It stands under "{title}".', (title.rstrip("."),))

    return _chosen("chapter", rng, documents, finds(), depth)


def field(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """An entry of a text of `Key: value` lines, such as a factbook."""

    def finds() -> Iterator[Find]:
        for text in documents:
            if text.path.endswith(".py"):
                continue
            entries = list(_ENTRY.finditer(text.text))
            times = Counter(entry[1] for entry in entries)
            for entry in entries:
                if times[entry[1]] == 1:
                    question = f'What does {text.path} say of "{entry[1]}"? Answer with its entry.'
                    yield Find(text, entry.start(1), question, f"{entry[1]}: {entry[2]}", (entry[2],))

    return _chosen("field", rng, documents, finds(), depth)


@dataclass(frozen=True)
class Definition:
    """A Python function or class whose name the texts define once."""

    text: Text
    at: int
    name: str
    is_function: bool
    parameters: tuple[str, ...]
    returned: str | None  # of its signature
    raised: tuple[str, ...]  # names, each once, in order
    summary: str | None  # its docstring's first line, without the full stop

    def ask(self, question: str, answer: str, *facts: str) -> Find:
        return Find(self.text, self.at, question, answer, facts)


_DEFINITION = re.compile(r"^([ \t]*)(?:async )?(def|class) (\w+)(?:\(([^()\n]*)\))?([^\n]*):[ \t]*$", re.M)
_DOCSTRING = re.compile(  # its first line, where a sentence or paragraph ends with it
    r"""\s*[rR]?("{3}|'{3})\s*(\w[^\n]*?)(?:\.?[ \t]*\1|\.[ \t]*\n|\n[ \t]*(?:\n|\1))"""
)
_RAISE = re.compile(r"^[ \t]+raise ([A-Z]\w*)", re.M)
_HEADING_WORDS = "CHAPTER|ACT|SCENE|BOOK|PART|LETTER|CANTO|Chapter|Act|Scene|Book|Part|Letter|Canto"
_HEADING = re.compile(
    rf"^(?:[ \t]*(?:{_HEADING_WORDS})[ ][^\n]{{1,60}}|\#{{1,4}}[ ][^\n]{{2,70}}|\w[^\n]{{2,70}}(?=\n[=~^*-]{{3,}}\n))$",
    re.M,
)
_LEAD = re.compile(r"\n(?:[=~^*-]{3,}\n)?\s*([A-Z`*][^.:|\n]{20,100}(?:\n[^.:|\n]{2,100}){0,2}\.)(?=\s)")
_SENTENCE = re.compile(r"^[ \t]*\w[^\n\"]{29,89}$", re.M)
_NAME_LINE = re.compile(r"^NAME\n[ \t]+([\w.-]+) (?:-|\\-|–) (\w[^\n]{9,90})$", re.M)
_ENTRY = re.compile(r"^[ \t]*([A-Z][\w ,/()-]{2,70}):[ \t]+(\w(?:[^\n]{0,78}[\w).%])?)[ \t]*$", re.M)


def definitions(documents: Sequence[Text]) -> list[Definition]:
    """Those with a name of four letters or more that is no special method's."""
    every = [(match, text) for text in documents for match in _DEFINITION.finditer(text.text)]
    times = Counter(match[3] for match, _ in every)
    return [
        _definition(match, text)
        for match, text in every
        if times[match[3]] == 1 and not match[3].startswith("__") and len(match[3]) >= 4
    ]


def _definition(match: re.Match, text: Text) -> Definition:
    body = _body(text.text[match.end() + 1 :], len(match[1]))
    docstring = _DOCSTRING.match(body)
    said = docstring[2].strip() if docstring else ""
    returned = match[5].strip().removeprefix("->").strip(" \"'") or None
    return Definition(
        text,
        match.start(),
        match[3],
        match[2] == "def",
        _parameters(match[4] or ""),
        returned if match[2] == "def" else None,
        tuple(dict.fromkeys(_RAISE.findall(body))),
        said if 4 <= len(said.split()) <= 25 else None,
    )


def _body(after: str, indent: int) -> str:
    """The lines that stand deeper than `indent`."""
    lines = []
    for line in after.splitlines(keepends=True):
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        lines.append(line)
    return "".join(lines)


def _parameters(inside: str) -> tuple[str, ...]:
    """Names of a one-line parameter list, without self and cls."""
    names = [re.split("[:=]", part)[0].strip(" *") for part in re.sub(r"\[[^\[\]]*\]", "", inside).split(",")]
    return tuple(name for name in names if name and name.isidentifier() and name not in ("self", "cls"))


def _sections(documents: Sequence[Text]) -> Iterator[tuple[Text, re.Match]]:
    """Headings of prose that occur once."""
    every = [
        (text, match) for text in documents if not text.path.endswith(".py") for match in _HEADING.finditer(text.text)
    ]
    times = Counter(_title(match) for _, match in every)
    return ((text, match) for text, match in every if times[_title(match)] == 1)


def _title(heading: re.Match) -> str:
    return " ".join(heading[0].lstrip("#").split())


def _end_of_section(text: Text, heading: re.Match) -> int:
    after = _HEADING.search(text.text, heading.end())
    return after.start() if after else len(text.text)


def _chosen(
    kind: str, rng: random.Random, documents: Sequence[Text], finds: Iterable[Find], depth: float | None
) -> Task:
    """The find that stands nearest to `depth`, any one without it."""
    finds = list(finds)
    if not finds:
        raise Unsuitable(f"nothing in the text for {kind}")
    total, before = max(sum(len(text.text) for text in documents), 1), {}
    offset = 0
    for text in documents:
        before[text.path] = offset
        offset += len(text.text)

    def place(find: Find) -> float:
        return (before[find.text.path] + find.at) / total

    find = rng.choice(finds) if depth is None else min(finds, key=lambda find: abs(place(find) - depth))
    line = find.text.text.count("\n", 0, find.at) + 1
    return Task(kind, tuple(documents), find.question, find.answer, find.facts, place(find), ((find.text.path, line),))
