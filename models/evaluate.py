"""How well a model reads: perplexity and tasks with known answers, under NSA and what it is compared with."""

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_models.cache import Cache
from nsa_models.comparators import COMPARATORS
from nsa_models.cost import keys_read
from nsa_models.errors import InputError
from nsa_models.training.data import Corpus, Layout, make_task
from nsa_models.training.tasks import Task, Unsuitable, is_right
from nsa_models.transformer import NSAModel

ATTENTIONS = ("full", "nsa", *COMPARATORS)
CHUNK = 1024  # tokens read at once
NORMAL = 1.96  # 95 %
BLOCK = 64  # tokens whose mean loss is one observation: losses of neighbours depend on one another


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % confidence interval; `samples`: what it is a mean of."""

    value: float
    low: float
    high: float
    samples: int


def tokens_read(model: NSAModel, attention: str, length: int) -> int:
    """Keys that the last query of a context of `length` tokens reads per key head; comparators read as many as NSA."""
    return length if attention == "full" else keys_read(model.config, length)


class Reader:
    """One context of up to `capacity` tokens, read under one kind of attention."""

    def __init__(self, model: NSAModel, attention: str, capacity: int) -> None:
        self.model, self.dense = model, attention == "full"
        self.cache = Cache.for_model(model, capacity)
        budget = tokens_read(model, attention, capacity)
        self.attention = COMPARATORS[attention](model.config, budget) if attention in COMPARATORS else None

    def read(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Append `ids`; yield the normed hidden states (T, H) chunk by chunk."""
        for start in range(0, len(ids), CHUNK):
            piece = torch.tensor(ids[start : start + CHUNK])
            yield self.model.advance(piece, self.cache, self.dense, attention=self.attention)

    def generate(self, ids: Sequence[int], most: int, ends: Sequence[int]) -> list[int]:
        """Read a prompt and answer it greedily with up to `most` tokens."""
        for hidden in self.read(ids):
            last = hidden[-1:]
        made: list[int] = []
        while len(made) < most:
            token = int(self.model.logits(last)[0].argmax())
            if token in ends:
                break
            made.append(token)
            (last,) = self.read([token])
        return made


def perplexity(model: NSAModel, ids: Sequence[int], length: int, attention: str, windows: int = 1) -> Measure:
    """exp of the mean loss of the next token over the text's first `windows` pieces of `length` tokens.

    Raises InputError if the text has not one.
    """
    if len(ids) < length:
        raise InputError(f"the text has {len(ids):,} tokens; perplexity at {length:,} needs as many")
    losses = []
    for start in range(0, min(windows, len(ids) // length) * length, length):
        losses.append(_losses(model, ids[start : start + length], attention))
    blocks = [block.mean().item() for window in losses for block in window.split(BLOCK)]
    mean = torch.cat(losses).mean().item()
    error = NORMAL * statistics.stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf
    return Measure(math.exp(mean), math.exp(mean - error), math.exp(min(mean + error, 700)), len(losses))


def _losses(model: NSAModel, ids: Sequence[int], attention: str) -> Tensor:
    """(T-1,) losses of every token but the first."""
    reader, at, losses = Reader(model, attention, len(ids)), 0, []
    targets = torch.tensor(ids)
    for hidden in reader.read(ids):
        wanted = targets[at + 1 : at + 1 + hidden.shape[0]].to(hidden.device)
        for rows, target in zip(hidden[: len(wanted)].split(256), wanted.split(256), strict=True):
            losses.append(
                torch.nn.functional.cross_entropy(model.logits(rows), target, reduction="none").double().cpu()
            )
        at += hidden.shape[0]
    return torch.cat(losses)


@dataclass(frozen=True)
class Trial:
    """One task that was asked, and whether the reply was right."""

    task: Task
    length: int
    tokens: int  # of the prompt
    depth: float  # asked for
    reply: str
    right: bool


def ask_tasks(
    model: NSAModel,
    layout: Layout,
    corpus: Corpus,
    kind: str,
    length: int,
    attention: str,
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """`samples` tasks of a kind at each depth, prompt and answer within `length` tokens; the same for every attention.

    A task that the text does not provide is left out.
    """
    trials = []
    for depth in depths:
        for i in range(samples):
            rng = random.Random(f"{seed}/{kind}/{length}/{depth}/{i}")
            try:
                task = make_task(rng, kind, corpus, layout, length, depth)
            except Unsuitable:
                done()
                continue
            prompt, answer = layout.asked(task)
            most = len(answer) + 16  # room for other words around the facts
            reader = Reader(model, attention, len(prompt) + most)
            reply = layout.tokenizer.decode(reader.generate(prompt, most, layout.tokenizer.eos_ids))
            trials.append(Trial(task, length, len(prompt), depth, reply, is_right(task, reply)))
            done()
    return trials


def share(trials: Sequence[Trial]) -> Measure:
    """The share of right replies, with Wilson's interval."""
    n, hits = len(trials), sum(trial.right for trial in trials)
    if not n:
        return Measure(math.nan, 0.0, 1.0, 0)
    p, z = hits / n, NORMAL
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Measure(p, max(middle - half, 0.0), min(middle + half, 1.0), n)
