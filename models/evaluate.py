"""How well a model reads: perplexity and tasks with known answers, under NSA and what it is compared with."""

import copy
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_models.cache import Cache
from nsa_models.comparators import COMPARATORS
from nsa_models.cost import keys_read
from nsa_models.engine import decode
from nsa_models.errors import InputError
from nsa_models.sampling import Sampling
from nsa_models.text import Text
from nsa_models.tokenizer import Tokenizer
from nsa_models.training.data import Corpus, Layout, fitting, make_task, plain_prompt
from nsa_models.training.kinds import FOUND, KINDS
from nsa_models.training.tasks import Task, Unsuitable, held_out, is_right, short_tasks
from nsa_models.transformer import NSAModel

USUAL = "usual"  # wording of questions; the other is "held-out"
ATTENTIONS = ("full", "nsa", *COMPARATORS)
CHUNK = 1024  # tokens read at once
NORMAL = 1.96  # 95 %
SHORT_REPLY = 40  # tokens, at most, of a reply to a short question
ASKED = 256  # tokens, at most, of a question, its answer and the template around them
BLOCK = 64  # tokens whose mean loss is one observation: losses of neighbours depend on one another


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % confidence interval; `samples`: what it is a mean of."""

    value: float
    low: float
    high: float
    samples: int


def tokens_read(model: NSAModel, attention: str, length: int) -> int:
    """Keys that the last query of a context of `length` tokens attends to per key head; all but full as many as NSA.

    A branch that no gate lets through is not attended to. What is read only to choose (NSA's compressed keys, the
    bounds of Quest's pages) is not counted.
    """
    return length if attention == "full" else keys_read(model.config, length, model.open_branches())


class Reader:
    """One context of up to `capacity` tokens, read under one kind of attention.

    `again`: the tokens that further prompts may begin with; they are not read again.
    """

    def __init__(self, model: NSAModel, attention: str, capacity: int, again: Sequence[int] = ()) -> None:
        self.model, self.dense = model, attention == "full"
        self.cache = Cache.for_model(model, capacity + (ASKED if again else 0))  # another may be longer
        budget = tokens_read(model, attention, capacity)
        self.attention = COMPARATORS[attention](model.config, budget) if attention in COMPARATORS else None
        self.again = list(again)
        for _ in self.read(self.again):
            pass
        self.state = copy.deepcopy(self.attention)

    def read(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Append `ids`; yield the normed hidden states (T, H) chunk by chunk."""
        for start in range(0, len(ids), CHUNK):
            piece = torch.tensor(ids[start : start + CHUNK])
            yield self.model.advance(piece, self.cache, self.dense, attention=self.attention)

    def generate(self, ids: Sequence[int], most: int, ends: Sequence[int]) -> list[int]:
        """Read a prompt, which begins with `again`, and answer it greedily with up to `most` tokens."""
        self.cache.truncate(len(self.again))
        self.attention = copy.deepcopy(self.state)
        for hidden in self.read(ids[len(self.again) :]):
            last = hidden[-1:]
        if self.attention is None:  # one of the two that the engine itself computes, and faster
            logits, sampling = self.model.logits(last)[0], Sampling(max_tokens=most)
            return list(decode(self.model, self.cache, logits, sampling, eos_ids=ends, dense=self.dense))
        made: list[int] = []
        while len(made) < most:
            token = int(self.model.logits(last)[0].argmax())
            if token in ends:
                break
            made.append(token)
            (last,) = self.read([token])
        return made


def perplexity(
    model: NSAModel,
    ids: Sequence[int],
    length: int,
    attention: str,
    windows: int = 1,
    *,
    longest: int | None = None,
    scored: int | None = None,
    done: Callable[[], None] = lambda: None,
) -> Measure:
    """exp of the mean loss of the next token, over the text's first `windows` windows of `longest` tokens (`length`).

    The last `scored` tokens of a window count (all but its first), read with as many before them as make `length`: the
    same tokens are predicted at every length, and only what stands before them grows. Raises InputError if the text
    has no window.
    """
    longest = longest or length
    if len(ids) < longest:
        raise InputError(f"the text has {len(ids):,} tokens; perplexity at {longest:,} needs as many")
    losses = []
    for end in range(longest, min(windows, len(ids) // longest) * longest + 1, longest):
        losses.append(_losses(model, ids[end - length : end], attention, scored or length - 1))
        done()
    blocks = [block.mean().item() for window in losses for block in window.split(BLOCK)]
    mean = torch.cat(losses).mean().item()
    error = NORMAL * statistics.stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf
    return Measure(math.exp(mean), math.exp(mean - error), math.exp(min(mean + error, 700)), len(losses))


def _losses(model: NSAModel, ids: Sequence[int], attention: str, scored: int) -> Tensor:
    """(scored,) losses of the last tokens."""
    reader, at, losses = Reader(model, attention, len(ids)), 0, []
    targets = torch.tensor(ids)
    for hidden in reader.read(ids):
        first = max(len(ids) - scored - 1 - at, 0)  # row whose next token is the first that counts
        wanted = targets[at + first + 1 : at + 1 + hidden.shape[0]].to(hidden.device)
        rows = hidden[first : first + len(wanted)]
        for some, target in zip(rows.split(256), wanted.split(256), strict=True):
            loss = torch.nn.functional.cross_entropy(model.logits(some), target, reduction="none")
            losses.append(loss.double().cpu())
        at += hidden.shape[0]
    return torch.cat(losses)


@dataclass(frozen=True)
class Trial:
    """One task that was asked, and whether the reply was right."""

    task: Task
    tokens: int  # of the prompt
    depth: float | None  # asked for
    reply: str
    right: bool
    named: bool | None = None  # whether evidence beside the reply names all that the answer takes; None = it names none


def ask_tasks(
    model: NSAModel,
    layout: Layout,
    asked: Iterable[tuple[Task | None, float]],
    attention: str,
    done: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """What `tasks` yields, less what the text does not provide, answered from the whole text."""
    trials, tokenizer, reader = [], layout.tokenizer, None
    for task, depth in asked:
        if task is not None:
            prompt, answer = layout.asked(task)
            most = longest_reply(answer)
            again = prompt[: (len(prompt) - ASKED) // CHUNK * CHUNK] if len(prompt) > ASKED else []
            capacity = len(prompt) + most
            if reader is None or reader.again != again or reader.cache.capacity < capacity:
                reader = None  # before there is another of its size
                reader = Reader(model, attention, capacity, again)
            trials.append(_ask(reader, tokenizer, task, prompt, most, depth))
        done()
    return trials


def tasks(
    layout: Layout,
    corpus: Corpus,
    kind: str,
    length: int,
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    wording: str = USUAL,
) -> Iterator[tuple[Task | None, float]]:
    """`samples` tasks at each depth, prompt and answer within `length` tokens, None for one that the text does not
    provide; the same for every attention. What stands in a text anyway is asked for in one text a sample, at all
    depths: it need be read only once.
    """
    maker = KINDS[kind] if wording == USUAL else held_out(KINDS[kind])
    for i in range(samples):
        shared = texts(layout, corpus, length, seed, i) if KINDS[kind] in FOUND else None
        for depth in depths:
            rng = random.Random(f"{seed}/{kind}/{length}/{depth}/{i}")
            try:
                if shared is None:
                    yield make_task(rng, maker, corpus, layout, length, depth), depth
                else:
                    task = maker(rng, shared, depth)
                    yield (task if sum(map(len, layout.asked(task))) <= length else None), depth
            except Unsuitable:
                yield None, depth


def texts(layout: Layout, corpus: Corpus, length: int, seed: int, sample: int) -> list[Text]:
    """Those that leave room for a question and its answer in `length` tokens, the same for every kind of task; none
    where the corpus has not so many.
    """
    rng = random.Random(f"{seed}/{length}/{sample}")
    try:
        return fitting(rng, corpus, length - min(ASKED, length // 4), lambda some: (some, len(layout.context(some))))
    except Unsuitable:
        return []


def longest_reply(answer: Sequence[int]) -> int:
    """Tokens of a reply: as the answer, and room for other words around the facts."""
    return len(answer) + 16


def ask_short(
    model: NSAModel, tokenizer: Tokenizer, attention: str, done: Callable[[], None] = lambda: None
) -> list[Trial]:
    """Every short question, asked as a chat does."""
    trials = []
    for task in short_tasks():
        prompt = plain_prompt(tokenizer, task.question)
        reader = Reader(model, attention, len(prompt) + SHORT_REPLY)
        trials.append(_ask(reader, tokenizer, task, prompt, SHORT_REPLY, None))
        done()
    return trials


def _ask(reader: Reader, tokenizer, task: Task, prompt: list[int], most: int, depth: float | None) -> Trial:
    reply = tokenizer.decode(reader.generate(prompt, most, tokenizer.eos_ids))
    return Trial(task, len(prompt), depth, reply, is_right(task, reply))


def share(trials: Sequence[Trial]) -> Measure:
    """The share of right replies, with Wilson's interval."""
    n, hits = len(trials), sum(trial.right for trial in trials)
    if not n:
        return Measure(math.nan, 0.0, 1.0, 0)
    p, z = hits / n, NORMAL
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Measure(p, max(middle - half, 0.0), min(middle + half, 1.0), n)
