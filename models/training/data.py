"""Documents and tasks -> batches. A batch is a function of the seed and its index: nothing has to be remembered.

A sequence is laid out as `nsa` lays out what it reads: the prompt's beginning, the listing and the headers, the texts,
the question last. The layout itself is handed in, so that there is one in the program.
"""

import hashlib
import json
import random
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from nsa_models.errors import InputError
from nsa_models.text import Text
from nsa_models.tokenizer import Tokenizer
from nsa_models.training.batch import Batch, Example, Exchange, pack
from nsa_models.training.config import TrainConfig
from nsa_models.training.kinds import FOUND, PRACTISED
from nsa_models.training.tasks import PLANTED, Maker, Task, Unsuitable, practised

SHORTEST = 64  # tokens: what is left of a batch below this stays empty
REREAD_FROM = (32_000, 128_000)  # characters, about 8,192 to 32,768 tokens: texts that passages are taken from
FOLLOW_UP = 64  # tokens, about, of a further question and its answer
Made = TypeVar("Made")
TRIES = 8  # texts: two in five hold nothing that `takes` could ask for, most nothing for `field`


@dataclass(frozen=True)
class Passage:
    """Some lines of a document, as text and as they are read."""

    text: Text
    ids: list[int]
    first_line: int  # of the document, from 1


@dataclass(frozen=True)
class Layout:
    """How texts become a context. context: documents -> ids, with headers and listing. passages: those that hold what
    the task's answer takes, among others that its question could lead to; of at most so many tokens. Raises Unsuitable.
    cited: answers end with the places they are from, (path:line).
    """

    tokenizer: Tokenizer
    context: Callable[[Sequence[Text]], list[int]]
    passages: Callable[[random.Random, Task, int], list[Passage]]
    cited: bool = False

    def asked(self, task: Task) -> Exchange:
        """Prompt and answer of a task; the answer ends as the model shall end it."""
        if not task.documents:
            return plain_prompt(self.tokenizer, task.question), self._answer(task)
        return self._asked(task, self.context(task.documents))

    def reread(self, rng: random.Random, task: Task, length: int, further: Sequence[Maker] = ()) -> list[Exchange]:
        """The same in at most `length` tokens, with passages in place of the documents; behind it what `further` can
        ask of the passages, one after another as in a chat, as far as they fit. Raises Unsuitable.
        """
        if not task.documents:
            return [self.asked(task)]
        room = length - sum(map(len, self._asked(task, []))) - FOLLOW_UP * len(further)
        passages = self.passages(rng, task, room)
        task = replace(task, answer=task.told([passage.text for passage in passages])) if task.told else task
        exchanges = [self._asked(task, [i for passage in passages for i in passage.ids])]
        told, room = {(task.kind, task.answer)}, length - sum(map(len, exchanges[0]))
        for maker in further:
            try:
                more = maker(rng, [passage.text for passage in passages], None)
                more = in_document(more, passages) if self.cited else more
            except Unsuitable:
                continue
            exchange = self._follow_up(more)
            if (more.kind, more.answer) not in told and sum(map(len, exchange)) <= room:
                exchanges.append(exchange)
                told.add((more.kind, more.answer))
                room -= sum(map(len, exchange))
        return exchanges

    def _asked(self, task: Task, context: list[int]) -> Exchange:
        around = self.tokenizer.prompt(task.question)
        return around.before + context + around.after, self._answer(task)

    def _follow_up(self, task: Task) -> Exchange:
        around = self.tokenizer.follow_up(task.question)
        end = list(self.tokenizer.eos_ids[:1])
        between = around.before[len(end) :] if around.before[: len(end)] == end else around.before
        return between + around.after, self._answer(task)

    def _answer(self, task: Task) -> list[int]:
        text = task.answer + (f" ({', '.join(cited(task))})" if self.cited and cited(task) else "")
        text = text if self.tokenizer.has_chat_template else " " + text
        return self.tokenizer.encode(text) + list(self.tokenizer.eos_ids[:1])


def cited(task: Task) -> list[str]:
    """Where the answer's facts stand, each place once, as `nsa` prints places; that nothing is there stands nowhere."""
    places = [] if task.kind == "absent" else task.places
    return list(dict.fromkeys(f"{path}:{line}" for path, line in places))


def in_document(task: Task, passages: Sequence[Passage]) -> Task:
    """A task about passages, its places as lines of their documents. Raises Unsuitable where two are of one document: a
    place does not say which of them it is in.
    """
    first = {path: [p.first_line for p in passages if p.text.path == path] for path, _ in task.places}
    if any(len(lines) > 1 for lines in first.values()):
        raise Unsuitable("two passages of one document")
    return replace(task, places=tuple((path, first[path][0] + line - 1) for path, line in task.places))


def plain_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """A question about no text, as a chat asks it."""
    before, _, close = tokenizer.prompt("")
    return [*before, *tokenizer.encode(question), *close]


class Corpus:
    """Documents that one is drawn from, the longer the likelier."""

    def __init__(self, documents: Sequence[Text]) -> None:
        self.documents = list(documents)
        self.ends = list(accumulate(len(d.text) for d in self.documents))

    def passage(self, rng: random.Random, characters: int) -> list[Text]:
        """Documents one after another from a random line on, cut to about `characters` at a line's end."""
        at = rng.randrange(self.ends[-1])
        i = bisect(self.ends, at)
        text = self.documents[i].text
        start = at - (self.ends[i] - len(text))
        if len(text) <= characters:  # a document that fits is read from its beginning
            start = 0
        start = text.rfind("\n", 0, start) + 1
        passage, room, paths = [], characters, set()
        while room > 0 and self.documents[i].path not in paths:
            document = self.documents[i]
            piece = document.text[start:]
            if len(piece) > room:
                piece = piece[: piece.rfind("\n", 0, room) + 1 or room]
            if piece.strip():
                passage.append(Text(document.path, piece))
            paths.add(document.path)
            room -= max(len(piece), 1)
            i, start = (i + 1) % len(self.documents), 0
        return passage


def from_root(documents: Sequence[Text]) -> Sequence[Text]:
    """The same, with paths from the folder that all of them are in, as a repository's files are named in it: all of
    a source's begin with its name.
    """
    folders = {document.path.partition("/")[0] if "/" in document.path else "" for document in documents}
    if len(folders) > 1 or "" in folders:
        return documents
    return [replace(document, path=document.path.partition("/")[2]) for document in documents]


class Mixture:
    """Batches from corpora and tasks. Calling it with (step, index) gives the index's batch, always the same."""

    def __init__(self, plan: TrainConfig, corpora: Sequence[tuple[Corpus, float]], layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.corpora, self.weights = [c for c, _ in corpora], [w for _, w in corpora]
        for kind in plan.data.tasks:
            if kind not in PRACTISED:
                raise InputError(f"config: data.tasks: no task {kind!r}; there are {', '.join(PRACTISED)}")

    def __call__(self, step: int, index: int) -> Batch:
        stage = self.plan.stage(step)
        rng = random.Random(f"{self.plan.seed}/{index}")
        tasks, reread = stage.shares(self.plan.data)
        examples, room = [], stage.batch_tokens or stage.length
        while not examples or room >= SHORTEST:
            examples.append(self.example(rng, min(room, stage.length), tasks, reread))
            room -= len(examples[-1].ids)
        return pack(examples, stage.context)

    def example(self, rng: random.Random, length: int, tasks: float, reread: float) -> Example:
        """One sequence of at most `length` tokens. tasks: their share; reread: that of them laid out as passages."""
        data = self.plan.data
        if rng.random() < tasks:
            kind = rng.choices(list(data.tasks), list(data.tasks.values()))[0]
            for _ in range(TRIES):
                try:
                    return self.task(rng, kind, self.corpus(rng), length, rng.random() < reread)
                except Unsuitable:
                    pass
        head = self.layout.tokenizer.prompt("").before
        passage = self.corpus(rng).passage(rng, 6 * length)
        return Example((head + self.layout.context(passage))[:length])

    def corpus(self, rng: random.Random) -> Corpus:
        return rng.choices(self.corpora, self.weights)[0]

    def task(self, rng: random.Random, kind: str, corpus: Corpus, length: int, reread: bool) -> Example:
        """A task of at most `length` tokens, with passages or with the whole text. Raises Unsuitable."""
        maker = self.maker(kind)
        if not reread:
            return Example.of([self.layout.asked(make_task(rng, maker, corpus, self.layout, length))])
        documents = corpus.passage(rng, rng.randint(*REREAD_FROM))
        task = maker(rng, from_root(documents) if rng.random() < 0.5 else documents, None)
        return Example.of(self.layout.reread(rng, task, length, self.follow_ups(rng)))

    def maker(self, kind: str) -> Maker:
        return practised(PRACTISED[kind], self.plan.data.reworded_share)

    def follow_ups(self, rng: random.Random) -> list[Maker]:
        """Of the plan's tasks those that ask for what stands in a text anyway, as often as the tasks themselves."""
        data = self.plan.data
        names = [maker.__name__ for maker in FOUND if data.tasks.get(maker.__name__)]
        if not names:
            return []
        return [self.maker(name) for name in rng.choices(names, [data.tasks[n] for n in names], k=data.follow_ups)]


def make_task(
    rng: random.Random, maker: Maker, corpus: Corpus, layout: Layout, length: int, depth: float | None = None
) -> Task:
    """A task whose prompt and answer take at most `length` tokens, and nearly that. Raises Unsuitable."""

    def made(passage: list[Text]) -> tuple[Task, int]:
        task = maker(rng, passage, depth)
        return task, sum(map(len, layout.asked(task)))

    return fitting(rng, corpus, length, made)


def fitting(rng: random.Random, corpus: Corpus, length: int, make: Callable[[list[Text]], tuple[Made, int]]) -> Made:
    """What `make` makes of a passage and says to take at most `length` tokens, and nearly that. Raises Unsuitable."""
    characters, state = 4.0 * length, rng.getstate()
    for _ in range(8):
        rng.setstate(state)  # the same passage, only shorter
        passage = corpus.passage(rng, max(int(characters), 1))
        if not passage:
            break  # so short that it is blank
        made, tokens = make(passage)
        if tokens <= length:
            return made
        characters *= min(0.97 * max(length - PLANTED, 1) / tokens, 0.9)
    raise Unsuitable(f"{length} tokens hold no such task")


def read_corpus(file: Path) -> list[Text]:
    """The documents of a .jsonl file, {"path": ..., "text": ...} a line, less blank ones. Raises InputError."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            found.append(Text(str(value["path"]), str(value["text"])))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f'{file}:{number}: not a document, {{"path": ..., "text": ...}}') from None
    return [text for text in found if text.text.strip()]


def digest(corpora: Iterable[tuple[Corpus, float]]) -> str:
    """Identity of what would be learned."""
    found = hashlib.sha256()
    for corpus, weight in corpora:
        found.update(repr(weight).encode())
        for document in corpus.documents:
            found.update(f"{document.path}\0{document.text}\0".encode(errors="surrogatepass"))
    return found.hexdigest()
