"""Documents and tasks -> batches. A batch is a function of the seed and its index: nothing has to be remembered.

A sequence is laid out as `nsa` lays out what it reads: the prompt's beginning, the listing and the headers, the texts,
the question last. The layout itself is handed in, so that there is one in the program.
"""

import hashlib
import json
import random
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from nsa_models.errors import InputError
from nsa_models.text import Text
from nsa_models.tokenizer import Tokenizer
from nsa_models.training.batch import Batch, Example, pack
from nsa_models.training.config import TrainConfig
from nsa_models.training.kinds import KINDS
from nsa_models.training.tasks import PLANTED, Task, Unsuitable

SHORTEST = 64  # tokens: what is left of a batch below this stays empty
REREAD_FROM = 32_000  # characters, about 8,192 tokens: texts that passages are taken from


@dataclass(frozen=True)
class Layout:
    """How texts become a context. context: documents -> ids, with headers and listing. passages: the ids of passages
    that hold what the task's answer takes, among others that its question could lead to; of at most so many tokens.
    Raises Unsuitable.
    """

    tokenizer: Tokenizer
    context: Callable[[Sequence[Text]], list[int]]
    passages: Callable[[random.Random, Task, int], list[int]]

    def asked(self, task: Task) -> tuple[list[int], list[int]]:
        """Prompt and answer of a task; the answer ends as the model shall end it."""
        return self._asked(task, self.context(task.documents))

    def reread(self, rng: random.Random, task: Task, length: int) -> tuple[list[int], list[int]]:
        """The same in at most `length` tokens, with passages in place of the documents. Raises Unsuitable."""
        room = length - sum(map(len, self._asked(task, [])))
        return self._asked(task, self.passages(rng, task, room))

    def _asked(self, task: Task, context: list[int]) -> tuple[list[int], list[int]]:
        around = self.tokenizer.prompt(task.question)
        answer = self.tokenizer.encode(task.answer if self.tokenizer.has_chat_template else " " + task.answer)
        return around.before + context + around.after, answer + list(self.tokenizer.eos_ids[:1])


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


class Mixture:
    """Batches from corpora and tasks. Calling it with (step, index) gives the index's batch, always the same."""

    def __init__(self, plan: TrainConfig, corpora: Sequence[tuple[Corpus, float]], layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.corpora, self.weights = [c for c, _ in corpora], [w for _, w in corpora]
        for kind in plan.data.tasks:
            if kind not in KINDS:
                raise InputError(f"config: data.tasks: no task {kind!r}; there are {', '.join(KINDS)}")

    def __call__(self, step: int, index: int) -> Batch:
        stage = self.plan.stage(step)
        rng = random.Random(f"{self.plan.seed}/{index}")
        examples, room = [], stage.batch_tokens or stage.length
        while not examples or room >= SHORTEST:
            examples.append(self.example(rng, min(room, stage.length)))
            room -= len(examples[-1].ids)
        return pack(examples, stage.context)

    def example(self, rng: random.Random, length: int) -> Example:
        """One sequence of at most `length` tokens."""
        corpus = rng.choices(self.corpora, self.weights)[0]
        tasks = self.plan.data.tasks
        if rng.random() < self.plan.data.task_share:
            kind = rng.choices(list(tasks), list(tasks.values()))[0]
            try:
                if rng.random() < self.plan.data.reread_share:
                    task = KINDS[kind](rng, corpus.passage(rng, REREAD_FROM))
                    prompt, answer = self.layout.reread(rng, task, length)
                else:
                    prompt, answer = self.layout.asked(make_task(rng, kind, corpus, self.layout, length))
                return Example(prompt + answer, len(prompt))
            except Unsuitable:
                pass  # a text without what this kind asks for is learned as a text
        head = self.layout.tokenizer.prompt("").before
        passage = corpus.passage(rng, 6 * length)
        return Example((head + self.layout.context(passage))[:length])


def make_task(
    rng: random.Random, kind: str, corpus: Corpus, layout: Layout, length: int, depth: float | None = None
) -> Task:
    """A task whose prompt and answer take at most `length` tokens, and nearly that. Raises Unsuitable."""
    characters, state = 4.0 * length, rng.getstate()
    for _ in range(8):
        rng.setstate(state)  # the same passage, only shorter
        passage = corpus.passage(rng, max(int(characters), 1))
        if not passage:
            break  # so short that it is blank
        task = KINDS[kind](rng, passage, depth)
        tokens = sum(map(len, layout.asked(task)))
        if tokens <= length:
            return task
        characters *= min(0.97 * max(length - PLANTED, 1) / tokens, 0.9)
    raise Unsuitable(f"{length} tokens hold no {kind} task")


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
