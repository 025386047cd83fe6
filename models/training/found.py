"""Questions about what stands in texts anyway: definitions in Python, sections and sentences in prose, entries.

Only what occurs once is asked for, so that the answer is exact. Nothing is parsed: passages are cut anywhere.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nsa_models.text import Text
from nsa_models.training import wordings
from nsa_models.training.tasks import Task, Unsuitable
from nsa_models.training.wordings import Wordings

MOST_FILES = 4  # with a name, that count: a prompt has passages of some two to five


@dataclass(frozen=True)
class Find:
    """Something to ask for: where it stands, the question about it, its answer and the answer's facts."""

    text: Text
    at: int  # characters from the text's beginning
    asked: Wordings
    answer: str
    facts: tuple[str, ...]
    weight: int = 1  # how often it is asked for


def defines(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """Which file defines a function or class that the texts define once."""
    return _chosen("defines", rng, documents, [d.which_file() for d in definitions(documents)], depth)


def mentioned(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """Which file defines a function or class that other files of the texts mention, and none of them defines."""
    finds = [d.which_file() for d in definitions(documents) if d.files > 1]
    return _chosen("mentioned", rng, documents, finds, depth)


def takes(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The parameters of a function that the texts define once: its signature, as it stands but for line breaks.

    Names copied alone went wrong: "takesctime", `type` for `type_`; of ten at 8,192 tokens four were missed.
    """
    finds = (
        d.ask(wordings.TAKES, d.signature, *d.parameters)
        for d in definitions(documents)
        if d.is_function and 1 <= len(d.parameters) <= 6
    )
    return _chosen("takes", rng, documents, finds, depth)


def returns(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The type that a function's signature says it returns."""
    finds = (
        d.ask(wordings.RETURNS, f"{d.name} returns {d.returned}.", d.returned)
        for d in definitions(documents)
        if d.returned not in (None, "None") and len(d.returned) <= 40
    )
    return _chosen("returns", rng, documents, finds, depth)


def raises(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The exceptions that a function's body raises by name."""
    finds = (
        d.ask(wordings.RAISES, f"{d.name} raises {', '.join(d.raised)}.", *d.raised)
        for d in definitions(documents)
        if d.is_function and 1 <= len(d.raised) <= 3
    )
    return _chosen("raises", rng, documents, finds, depth)


def usage(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The function whose docstring says that it does what is asked for."""
    every = [d for d in definitions(documents) if d.is_function and d.purpose]
    times = Counter(d.purpose for d in every)
    finds = (
        Find(d.text, d.at, wordings.USAGE.filled(purpose=d.purpose), f"With {d.name}, in {d.text.path}.", (d.name,))
        for d in every
        if times[d.purpose] == 1
    )
    return _chosen("usage", rng, documents, finds, depth)


def summary(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """The sentence that sums something up: of a definition's docstring, a section's lead, a manual page's NAME line."""

    def finds() -> Iterator[Find]:
        for d in definitions(documents):
            if d.summary:
                yield d.ask(wordings.SUMMARY, d.summary + ".", d.summary)
        for text, heading in _sections(documents):
            lead = _LEAD.match(text.text, heading.end())
            if lead:
                said = " ".join(lead[1].split())
                asked = wordings.LEAD.filled(title=_title(heading))
                yield Find(text, heading.start(), asked, said, (said.rstrip("."),))
        for text in documents:
            for match in _NAME_LINE.finditer(text.text):
                yield Find(text, match.start(1), wordings.MANUAL.filled(name=match[1]), match[2], (match[2],))

    return _chosen("summary", rng, documents, finds(), depth)


def chapter(rng: random.Random, documents: Sequence[Text], depth: float | None = None) -> Task:
    """A line of prose: under which heading does it stand?"""

    def finds() -> Iterator[Find]:
        times = Counter(line.strip() for text in documents for line in text.text.splitlines())
        for text, heading in _sections(documents):
            for line in _SENTENCE.finditer(text.text, heading.end(), _end_of_section(text, heading)):
                if times[line[0].strip()] == 1:
                    asked, title = wordings.CHAPTER.filled(line=line[0].strip()), _title(heading)
                    yield Find(text, line.start(), asked, f'It stands under "{title}".', (title.rstrip("."),))

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
                    asked = wordings.FIELD.filled(path=text.path, entry=entry[1])
                    yield Find(text, entry.start(1), asked, f"{entry[1]}: {entry[2]}", (entry[2],))

    return _chosen("field", rng, documents, finds(), depth)


@dataclass(frozen=True)
class Definition:
    """A Python function or class whose name the texts define once."""

    text: Text
    at: int
    name: str
    is_function: bool
    signature: str  # on one line, without comments and the type that is returned
    parameters: tuple[str, ...]
    returned: str | None  # of its signature
    raised: tuple[str, ...]  # names, each once, in order
    summary: str | None  # its docstring's first line, without the full stop
    files: int  # that have its name

    @property
    def purpose(self) -> str | None:
        """The summary as it follows "How do I", where it tells what to do."""
        said = self.summary or ""
        return said[0].lower() + said[1:] if _PURPOSE.match(said) else None

    @property
    def weight(self) -> int:
        """The more files have a name, the harder it is to tell which one defines it: at 65,536 tokens of psutil two of
        five were told wrong. Asked of all names alike, 12 of 104 were in another file too.
        """
        return min(self.files, MOST_FILES) ** 2

    def which_file(self) -> Find:
        return self.ask(wordings.DEFINES, f"{self.text.path} defines {self.name}.", self.text.path)

    def ask(self, asked: Wordings, answer: str, *facts: str) -> Find:
        kind = "function" if self.is_function else "class"
        return Find(self.text, self.at, asked.filled(name=self.name, kind=kind), answer, facts, self.weight)


_DEFINITION = re.compile(r"^([ \t]*)(?:async )?(def|class) (\w+)(?:\(((?:[^()]|\([^()]*\))*)\))?([^\n]*):[ \t]*$", re.M)
_DOCSTRING = re.compile(  # its first line, where a sentence or paragraph ends with it
    r"""\s*[rR]?("{3}|'{3})\s*(\w[^\n]*?)(?:\.?[ \t]*\1|\.[ \t]*\n|\n[ \t]*(?:\n|\1))"""
)
_PURPOSE = re.compile(  # a sentence that tells what to do
    r"(?:Add|Append|Apply|Build|Calculate|Call|Check|Clear|Close|Collect|Compare|Compile|Compute|Convert|Copy|Create|"
    r"Decode|Delete|Determine|Draw|Encode|Escape|Execute|Extract|Fetch|Find|Flush|Format|Generate|Get|Import|Initialize|"
    r"Insert|Iterate|Join|List|Load|Log|Look|Make|Merge|Move|Normalize|Open|Parse|Pop|Print|Process|Read|Receive|Register|"
    r"Remove|Rename|Render|Replace|Reset|Resolve|Return|Run|Save|Search|Send|Serialize|Set|Show|Skip|Sort|Split|Start|"
    r"Stop|Store|Test|Unregister|Update|Validate|Verify|Wait|Walk|Wrap|Write|Yield) [^?]+$"
)
_ASSIGNED = re.compile(r"^(\w+)(?:: [^\n=]+)? = ", re.M)  # by the module itself
_WORD = re.compile(r"\w+")
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
    """Those with a name of four letters or more that is no special method's, and that no other text assigns: of psutil
    both `_pslinux.py` (def) and `_pswindows.py` (= cext.disk_io_counters) define `disk_io_counters`.
    """
    every = [(match, text) for text in documents for match in _DEFINITION.finditer(text.text)]
    times = Counter(match[3] for match, _ in every)
    assigned = defaultdict(set)
    for text in documents:
        for match in _ASSIGNED.finditer(text.text):
            assigned[match[1]].add(text.path)
    files = Counter(word for text in documents for word in set(_WORD.findall(text.text)))
    return [
        _definition(match, text, files[name])
        for match, text in every
        if times[name := match[3]] == 1 and not name.startswith("__") and len(name) >= 4
        if assigned[name] <= {text.path}
    ]


def _definition(match: re.Match, text: Text, files: int) -> Definition:
    body = _body(text.text[match.end() + 1 :], len(match[1]))
    docstring = _DOCSTRING.match(body)
    said = docstring[2].strip() if docstring else ""
    returned = match[5].strip().removeprefix("->").strip(" \"'") or None
    return Definition(
        text,
        match.start(),
        match[3],
        match[2] == "def",
        f"{match[3]}({_one_line(match[4] or '')})",
        _parameters(match[4] or ""),
        returned if match[2] == "def" else None,
        tuple(dict.fromkeys(_RAISE.findall(body))),
        said if 4 <= len(said.split()) <= 25 else None,
        files,
    )


def _body(after: str, indent: int) -> str:
    """The lines that stand deeper than `indent`."""
    lines = []
    for line in after.splitlines(keepends=True):
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        lines.append(line)
    return "".join(lines)


def _one_line(inside: str) -> str:
    """A parameter list without line breaks and comments."""
    return " ".join(re.sub(r"[ \t]+#.*", "", inside).split()).removesuffix(",")


def _parameters(inside: str) -> tuple[str, ...]:
    """Names of a parameter list, without self and cls."""
    flat = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]|\([^()]*\)|#.*", "", inside))
    names = [re.split("[:=]", part)[0].strip(" *\n") for part in flat.split(",")]
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
    """The find that stands nearest to `depth`; without it any one by weight, as often of many facts as of one."""
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

    if depth is None:
        facts = rng.choice(sorted({len(find.facts) for find in finds}))
        some = [find for find in finds if len(find.facts) == facts]
        (find,) = rng.choices(some, [find.weight for find in some])
    else:
        find = min(finds, key=lambda find: abs(place(find) - depth))
    line = find.text.text.count("\n", 0, find.at) + 1
    where, places = place(find), ((find.text.path, line),)
    return Task(kind, tuple(documents), find.asked.usual, find.answer, find.facts, where, places, find.asked)
