"""Sequences packed one after another: what one pass of the model computes."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

JUMP_AT = 64  # tokens: no block that is compressed or selected shall hold a jump

Exchange = tuple[list[int], list[int]]  # tokens that are read, and those that are to be answered


@dataclass(frozen=True)
class Example:
    """One sequence of token ids. answers: where they stand, which are learned; None = all is."""

    ids: Sequence[int]
    answers: Sequence[range] | None = None

    @classmethod
    def of(cls, exchanges: Iterable[Exchange]) -> "Example":
        """What was asked and answered, one after another."""
        ids: list[int] = []
        answers = []
        for read, answer in exchanges:
            ids += read
            answers.append(range(len(ids), len(ids) + len(answer)))
            ids += answer
        return cls(ids, answers)


@dataclass(frozen=True)
class Batch:
    """T tokens of several sequences. At row t, `targets[t]` is the token to predict, -1 at the end of a sequence."""

    ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64
    answers: Tensor  # (T,) bool: the target belongs to an answer
    asked: Tensor  # (T,) bool: the sequence has an answer, so that its text is not learned
    positions: Tensor  # (T,) int64: each token's in its sequence
    lengths: list[int]
    context: int = 0  # tokens that positions are scaled for, in sequences that are shorter

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device) -> "Batch":
        moved = (t.to(device) for t in (self.ids, self.targets, self.answers, self.asked, self.positions))
        return Batch(*moved, self.lengths, self.context)


def pack(examples: Sequence[Example], context: int = 0, jumps: int = 0, rng: random.Random | None = None) -> Batch:
    """One batch of at least one example, in their order. jumps: of positions, in each of them; drawn from `rng`."""
    ids, targets, answers, asked = [], [], [], []
    for example in examples:
        n, learned = len(example.ids), {i for answer in example.answers or () for i in answer}
        ids += example.ids
        targets += [*example.ids[1:], -1]
        answers += [i + 1 in learned for i in range(n)]
        asked += [example.answers is not None] * n
    placed = [jumping(len(example.ids), context, jumps, rng or random.Random(0)) for example in examples]
    return Batch(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(answers),
        torch.tensor(asked),
        torch.cat(placed),
        [len(example.ids) for example in examples],
        context,
    )


def jumping(length: int, context: int, jumps: int, rng: random.Random) -> Tensor:
    """(length,) rising positions below `context` that jump so many times: distances of a long context in a short one
    (positional skip-wise training, arXiv 2309.10400). Where they jump and how far together is drawn evenly, as far as
    there is room; between jumps they follow one another.
    """
    places = range(JUMP_AT, length, JUMP_AT)
    count, room = min(jumps, len(places)), context - length
    if count <= 0 or room <= 0:
        return torch.arange(length)
    ends = sorted(rng.randint(0, room) for _ in range(count))  # positions that are left out up to each jump
    steps = torch.zeros(length, dtype=torch.long)
    steps[sorted(rng.sample(places, count))] = torch.tensor(ends).diff(prepend=torch.zeros(1, dtype=torch.long))
    return torch.arange(length) + steps.cumsum(0)
