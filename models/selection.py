"""Which blocks the selected branch chose, beyond those it must: the raw material of evidence."""

import torch
from torch import Tensor

from nsa_models.config import NSAConfig


class SelectionCount:
    """Counts free choices per selection block, beside what uniform choice would have given."""

    def __init__(self, config: NSAConfig, capacity: int) -> None:
        """capacity: the most tokens that queries may see."""
        self.variant = config.variant
        blocks = self.variant.block_count(capacity)
        self.counts = torch.zeros(blocks, dtype=torch.float64)  # (NB,) times chosen, over layers, heads and queries
        self.expected = torch.zeros(blocks, dtype=torch.float64)  # (NB,) the same if chosen at random

    def add(self, block_indices: Tensor, offset: int) -> None:
        """block_indices: (L, T, HKV, n) of T queries from position `offset`, -1 = none."""
        v = self.variant
        L, T, HKV, _ = block_indices.shape
        index = block_indices.to("cpu", torch.int64)
        current = (torch.arange(offset, offset + T) // v.select_block)[:, None, None]
        free = (index >= v.initial_blocks) & (index <= current - v.local_blocks)
        self.counts += torch.bincount(index[free], minlength=self.counts.numel())
        picks = free.sum((0, 2, 3)).double()  # (T,) free choices of all layers and heads
        for t, last in enumerate((current.flatten() - v.local_blocks + 1).tolist()):
            if last > v.initial_blocks:
                self.expected[v.initial_blocks : last] += picks[t] / (last - v.initial_blocks)

    def lift(self) -> Tensor:
        """(NB,) times chosen over times expected; 1 = chance, 0 where a block was never open to choice."""
        return torch.where(self.expected > 0, self.counts / self.expected.clamp(min=1e-12), 0.0)
