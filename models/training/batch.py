"""Sequences packed one after another: what one pass of the model computes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One sequence of token ids. answer: where its answer starts, from which on it is learned; None = everywhere."""

    ids: Sequence[int]
    answer: int | None = None


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
        n, start = len(example.ids), example.answer
        ids += example.ids
        targets += [*example.ids[1:], -1]
        answers += [start is not None and i + 1 >= start and i + 1 < n for i in range(n)]
        asked += [start is not None] * n
    return Batch(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(answers),
        torch.tensor(asked),
        [len(example.ids) for example in examples],
        context,
    )
