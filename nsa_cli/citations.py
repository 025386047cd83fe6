"""What an answer quotes and refers to, looked up in the text it is about: there word for word, nearly or not."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_cli.context import Context, ContextFile

WordsOf = Callable[[int], tuple[list[str], list[tuple[int, int]]]]  # index of a file -> `_words` of its text

REPAIRED = 0.8  # share of a quote's words that stand in the text in their order, for it to be a quote of that place
MIN_WORDS = 3  # fewer in quotation marks are a name or a word in doubt, not a quote
QUOTE = re.compile(r'"([^"\n]+(?:\n[^"\n]+){0,3})"|“([^“”]+)”|«([^«»]+)»|^> ?(.+(?:\n> ?.+)*)', re.MULTILINE)
REFERENCE = re.compile(r"(?<![\w./:-])([\w./-]*[\w-]\.[A-Za-z]\w*):(\d{1,9})(?:-(\d{1,9}))?(?![\w:])")
# A path that names no line: with a folder, for `a.b` may as well be code.
FILE = re.compile(r"(?<![\w./:-])(?:[\w.-]+/)+[\w.-]*[\w-]\.[A-Za-z]\w*(?![\w/-]|:\d|\.\w)")
EDGES = " .,;:!?…\"'"
# Spellings that differ between typesetters, not between texts.
ALIKE = (("['’‘`]", "['’‘`]"), ('["“”„«»]', '["“”„«»]'), ("[-‐‑–—]+", "[-‐‑–—]+"))


@dataclass(frozen=True)
class Citation:
    """kind: quote or reference. status of a quote: verbatim (but for line breaks), similar (but for case, quotation
    marks and dashes), repaired (other words stand there: `repaired`) or missing; of a reference: exists or missing.
    path, start, end: the lines that hold it.
    """

    kind: str
    text: str
    status: str
    path: str | None = None
    start: int | None = None
    end: int | None = None
    place: str | None = None  # the same as people cite it: `a.py:3-9`, `book.pdf p. 41`
    repaired: str | None = None  # what the text says there

    @property
    def found(self) -> bool:
        return self.status not in ("missing", "repaired")

    def __str__(self) -> str:
        text = _short(self.text)
        if self.repaired:
            return f'{self.place}  says "{_short(self.repaired)}", not "{text}"'
        if self.kind == "reference":
            return f"{self.text}  {'is in the text' if self.found else 'is not in the text'}"
        where = f"{self.place}  {self.status} " if self.found else "not in the text: "
        return f'{where}"{text}"'

    def to_json(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_citations(answer: str, context: "Context") -> list[Citation]:
    """Every quote and path:line reference of the answer, in its order, looked up in the context; and the paths that no
    file of the context has.
    """
    words = cache(lambda index: _words(context.files[index].text))
    found = [(at, _look_up_quote(text, context, words)) for at, text in _quotes(answer)]
    found += [(match.start(), _look_up_reference(match, context)) for match in REFERENCE.finditer(answer)]
    found += [
        (match.start(), Citation("reference", match[0], "missing"))
        for match in FILE.finditer(answer)
        if not _is_known(match[0].removeprefix("./"), context)
    ]
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


def _look_up_quote(text: str, context: "Context", words_of: WordsOf) -> Citation:
    words = text.strip(EDGES).split()
    exact = r"\s+".join(map(re.escape, words))
    alike = r"\s+".join(map(_alike, words))
    for status, pattern in (("verbatim", re.compile(exact)), ("similar", re.compile(alike, re.IGNORECASE))):
        for file in context.files:
            match = pattern.search(file.text) if words else None
            if match:
                return Citation("quote", text, status, *_place(file, match.start(), match.end(), context))
    return _repair(text, context, words_of) or Citation("quote", text, "missing")


def _place(file: "ContextFile", start: int, end: int, context: "Context") -> tuple[str, int, int, str]:
    lines = [file.file_line(file.line_at(at)) for at in (start, end - 1)]
    return file.path, *lines, context.cite(file.path, *lines)


def _repair(text: str, context: "Context", words_of: WordsOf) -> Citation | None:
    """The place that most of the quote's words are from, with what stands there, if there is one.

    In each file the longest run of words of the quote says where to look; the best file counts.
    """
    wanted, _ = _words(text)
    best, found = REPAIRED, None
    for index, file in enumerate(context.files):
        bare, spans = words_of(index)
        run = SequenceMatcher(None, bare, wanted, autojunk=False).find_longest_match()
        start = max(run.a - run.b - len(wanted) // 4, 0)
        near = SequenceMatcher(None, bare[start : run.a - run.b + len(wanted) * 5 // 4 + 1], wanted, autojunk=False)
        blocks = [block for block in near.get_matching_blocks() if block.size]
        if not blocks:
            continue
        first, last = start + blocks[0].a, start + blocks[-1].a + blocks[-1].size
        share = sum(block.size for block in blocks) / max(last - first, len(wanted))
        if share >= best:
            begin, end = spans[first][0], spans[last - 1][1]
            place = _place(file, begin, end, context)
            best, found = share, Citation("quote", text, "repaired", *place, " ".join(file.text[begin:end].split()))
    return found


def _words(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words of a text, in lower case and without punctuation, and where each stands."""
    found = [(re.sub(r"\W+", "", match[0].casefold()), match.span()) for match in re.finditer(r"\S+", text)]
    return [word for word, _ in found if word], [span for word, span in found if word]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


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


def _is_known(path: str, context: "Context") -> bool:
    """Whether there is such a file, from whatever folder on, or the text names one. Of a kind that the context has none
    of, anything may be meant: `and/or.both`.
    """
    paths = {f"/{file.path}" for file in (*context.documents, *context.files)}
    if not any(known.endswith(PurePosixPath(path).suffix) for known in paths):
        return True
    same = (f"/{path}".endswith(known) or known.endswith(f"/{path}") for known in paths)
    return any(same) or any(path in file.text for file in context.files)


def _files(path: str, files: Sequence["ContextFile"]) -> list["ContextFile"]:
    """Those of that path; else those whose path ends so, if they are all one file."""
    exact = [file for file in files if file.path == path]
    ending = [file for file in files if file.path.endswith("/" + path)]
    return exact or (ending if len({file.path for file in ending}) == 1 else [])
