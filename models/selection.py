"""Where the selected branch looked beyond the blocks it must read: the raw material of evidence."""

import torch
from torch import Tensor

from nsa_models.config import NSAConfig


class SelectionMass:
    """Softmax mass that queries gave to freely chosen blocks, over all layers and heads, beside an expectation.

    `mass` and `expected` are (NB,), one entry a selection block. Blocks that are forced for any of the queries are left
    out: what lies right before a question is local to its first words only.
    """

    def __init__(self, config: NSAConfig, capacity: int) -> None:
        """capacity: the most tokens that queries may see."""
        self.config = config
        blocks = config.variant.block_count(capacity)
        self.mass = torch.zeros(blocks, dtype=torch.float64)
        self.expected = torch.zeros(blocks, dtype=torch.float64)  # the same mass spread evenly, or `calibrate`
        self.queries = 0  # times layers
        self.open = -1  # blocks from here on are, or were for the first query, local

    def add(self, q: Tensor, k: Tensor, block_indices: Tensor, offset: int) -> None:
        """One layer's queries q (T, HQ, D) from position `offset`, its keys k (S, HKV, D) and what they chose
        (T, HKV, n), -1 = none.
        """
        v = self.config.variant
        index = block_indices.to(torch.int64)
        if self.open < 0:
            self.open = offset // v.select_block - v.local_blocks + 1
        free = (index >= v.initial_blocks) & (index < self.open)
        mass = block_mass(q, k, index, v.select_block, offset).masked_fill(~free, 0).double().cpu()
        self.mass.index_add_(0, index.masked_fill(~free, 0).flatten().cpu(), mass.flatten())
        self.queries += q.shape[0]
        if self.open > v.initial_blocks:
            self.expected[v.initial_blocks : self.open] += mass.sum() / (self.open - v.initial_blocks)

    def calibrate(self, neutral: "SelectionMass") -> None:
        """Expect what `neutral`, a question that asks nothing in particular, drew per query from the same context."""
        if neutral.queries:
            self.expected = neutral.mass * (self.queries / neutral.queries)


def block_mass(q: Tensor, k: Tensor, index: Tensor, size: int, offset: int) -> Tensor:
    """Softmax mass of each chosen block, summed over the heads of a group: (T, HKV, n), 0 for none.

    q: (T, HQ, D); k: (S, HKV, D); index: (T, HKV, n) blocks of `size` tokens, -1 = none. offset: the first
    query's position.
    """
    T, HQ, D = q.shape
    HKV, n = index.shape[1:]
    position = torch.arange(offset, offset + T, device=q.device)[:, None]
    mass = torch.empty(index.shape, device=q.device)
    for h in range(HKV):
        token = (index[:, h, :, None] * size + torch.arange(size, device=q.device)).flatten(1)  # (T, n*size)
        visible = (token >= 0) & (token <= position)
        keys = k[:, h][token.clamp(0, k.shape[0] - 1)].to(q.dtype)  # (T, n*size, D)
        group = q[:, h * (HQ // HKV) : (h + 1) * (HQ // HKV)] * D**-0.5
        scores = torch.bmm(group, keys.transpose(1, 2)).float().masked_fill(~visible[:, None], -torch.inf)
        mass[:, h] = torch.softmax(scores, -1).sum(1).view(T, n, size).sum(-1)
    return mass
