"""Sequences packed one after another: what one pass of the model computes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    lengths: list[int]
    context: int = 0  # tokens that positions are scaled for, in sequences that are shorter

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device) -> "Batch":
        moved = (t.to(device) for t in (self.ids, self.targets, self.answers, self.asked))
        return Batch(*moved, self.lengths, self.context)


def pack(examples: Sequence[Example], context: int = 0) -> Batch:
    """One batch of at least one example, in their order."""
    ids, targets, answers, asked = [], [], [], []
    for example in examples:
        n, learned = len(example.ids), {i for answer in example.answers or () for i in answer}
        ids += example.ids
        targets += [*example.ids[1:], -1]
        answers += [i + 1 in learned for i in range(n)]
        asked += [example.answers is not None] * n
    return Batch(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(answers),
        torch.tensor(asked),
        [len(example.ids) for example in examples],
        context,
    )
