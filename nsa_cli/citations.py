"""What an answer quotes and refers to, looked up in the text it is about: there word for word, nearly or not."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_cli.context import Context, ContextFile

MIN_WORDS = 3  # fewer in quotation marks are a name or a word in doubt, not a quote
QUOTE = re.compile(r'"([^"\n]+(?:\n[^"\n]+){0,3})"|“([^“”]+)”|«([^«»]+)»|^> ?(.+(?:\n> ?.+)*)', re.MULTILINE)
REFERENCE = re.compile(r"(?<![\w./:-])([\w./-]*[\w-]\.[A-Za-z]\w*):(\d{1,9})(?:-(\d{1,9}))?(?![\w:])")
EDGES = " .,;:!?…\"'"
# Spellings that differ between typesetters, not between texts.
ALIKE = (("['’‘`]", "['’‘`]"), ('["“”„«»]', '["“”„«»]'), ("[-‐‑–—]+", "[-‐‑–—]+"))


@dataclass(frozen=True)
class Citation:
    """kind: quote or reference. status of a quote: verbatim (but for line breaks), similar (but for case, quotation
    marks and dashes) or missing; of a reference: exists or missing. path, start, end: the lines that hold it.
    """

    kind: str
    text: str
    status: str
    path: str | None = None
    start: int | None = None
    end: int | None = None
    place: str | None = None  # the same as people cite it: `a.py:3-9`, `book.pdf p. 41`

    @property
    def found(self) -> bool:
        return self.status != "missing"

    def __str__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        if self.kind == "reference":
            return f"{self.text}  {'is in the text' if self.found else 'is not in the text'}"
        where = f"{self.place}  {self.status} " if self.found else "not in the text: "
        return f'{where}"{text}"'

    def to_json(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_citations(answer: str, context: "Context") -> list[Citation]:
    """Every quote and path:line reference of the answer, in its order, looked up in the context."""
    found = [(at, _look_up_quote(text, context)) for at, text in _quotes(answer)]
    found += [(match.start(), _look_up_reference(match, context)) for match in REFERENCE.finditer(answer)]
    return [citation for _, citation in sorted(found, key=lambda item: item[0])]


def texts_in(data: object) -> str:
    """The texts that a JSON value holds: its own quotation marks quote nothing."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        return "\n\n".join(filter(None, map(texts_in, data)))
    return data if isinstance(data, str) else ""


def _quotes(answer: str) -> Iterator[tuple[int, str]]:
    for match in QUOTE.finditer(answer):
        text = " ".join(re.sub(r"^> ?", "", next(filter(None, match.groups())), flags=re.MULTILINE).split())
        if len(text.split()) >= MIN_WORDS:
            yield match.start(), text


def _look_up_quote(text: str, context: "Context") -> Citation:
    words = text.strip(EDGES).split()
    exact = r"\s+".join(map(re.escape, words))
    alike = r"\s+".join(map(_alike, words))
    for status, pattern in (("verbatim", re.compile(exact)), ("similar", re.compile(alike, re.IGNORECASE))):
        for file in context.files:
            match = pattern.search(file.text) if words else None
            if match:
                lines = [file.file_line(file.line_at(at)) for at in (match.start(), match.end() - 1)]
                return Citation("quote", text, status, file.path, *lines, context.cite(file.path, *lines))
    return Citation("quote", text, "missing")


def _alike(word: str) -> str:
    pattern = re.escape(word)
    for spelling, any_spelling in ALIKE:
        pattern = re.sub(r"\\?" + spelling, lambda _, all_=any_spelling: all_, pattern)
    return pattern


def _look_up_reference(match: re.Match, context: "Context") -> Citation:
    path, start, end = match[1], int(match[2]), int(match[3] or match[2])
    for file in _files(path.removeprefix("./"), context.files):
        first, last = (file.file_line(n) for n in (file.first_line, file.first_line + len(file.line_ends) - 1))
        if first <= start <= end <= last:
            return Citation("reference", match[0], "exists", file.path, start, end, context.cite(file.path, start, end))
    return Citation("reference", match[0], "missing")


def _files(path: str, files: Sequence["ContextFile"]) -> list["ContextFile"]:
    """Those of that path; else those whose path ends so, if they are all one file."""
    exact = [file for file in files if file.path == path]
    ending = [file for file in files if file.path.endswith("/" + path)]
    return exact or (ending if len({file.path for file in ending}) == 1 else [])
