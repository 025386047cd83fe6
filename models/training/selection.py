"""Teach what chooses blocks: no gradient passes the choice itself, so it gets a loss of its own.

The target is what dense attention reads: its probabilities, summed over a block's tokens and a group's heads.
Compressed keys are right where the importance that they give (paper eq. 9 and 10) has the same shares. DeepSeek-V3.2
warms its indexer up so, SeerAttention (arXiv 2410.13276) distils its gate so. Forced blocks are read in any case and
left out of both.
"""

import torch
from torch import Tensor

from nsa_kernels.reference import block_importance
from nsa_models.config import NSAConfig
from nsa_models.retrieval import by_block
from nsa_models.training.batch import Batch
from nsa_models.training.forward import Keys, Weights, hidden_states

ROWS = 256  # queries of a sequence that are compared; with 9 heads and 8,192 tokens their probabilities take 75 MB


class SelectionLoss:
    """Watches a pass over `batch`; `mean` is then that of KL(dense || importance) over its layers and sequences.

    Gradients reach compression and, where the pass has them, the queries and keys that are compared.
    """

    def __init__(self, config: NSAConfig, batch: Batch) -> None:
        self.config = config
        self.rows = [_rows(config, mask) for mask in batch.answers.split(batch.lengths)]
        self.losses: list[Tensor] = []

    def __call__(self, sequence: int, keys: Keys) -> None:
        rows = self.rows[sequence]
        rows = rows[(rows >= keys.start) & (rows < keys.k.shape[0])]
        if rows.numel():
            with torch.enable_grad():
                self.losses.append(divergence(self.config, keys, rows))

    @property
    def mean(self) -> Tensor | None:
        """None where no sequence is long enough for a choice."""
        return torch.stack(self.losses).mean() if self.losses else None


def selection_loss(config: NSAConfig, weights: Weights, batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """`SelectionLoss` by itself: the pass needs no gradients, and compression alone gets them."""
    watch = SelectionLoss(config, batch)
    with torch.no_grad():
        hidden_states(config, weights, batch.ids, batch.lengths, context=batch.context, dtype=dtype, watch=watch)
    return watch.mean


def _rows(config: NSAConfig, answers: Tensor) -> Tensor:
    """Queries that choose: those that predict an answer, and others evenly over the rest of the sequence."""
    first = config.select_count * config.select_block  # before it every block is read
    count = answers.shape[0] - first
    if count <= 0:
        return answers.new_empty(0, dtype=torch.long)
    chosen = torch.zeros_like(answers)
    chosen[first:] = answers[first:]
    chosen[first + torch.arange(min(ROWS, count), device=answers.device) * count // min(ROWS, count)] = True
    return chosen.nonzero()[:, 0]


def divergence(config: NSAConfig, keys: Keys, rows: Tensor) -> Tensor:
    """KL of one layer's choice at the queries `rows`, each weighted by what dense attention gives to free blocks."""
    variant, HKV = config.variant, config.num_kv_heads
    blocks = variant.block_count(keys.k.shape[0])
    free = free_blocks(config, rows, blocks)[:, None]
    with torch.no_grad():
        p = probabilities(keys.q[rows - keys.start], keys.k, rows + 1)
        wanted = by_block(p.unflatten(1, (HKV, -1)).sum(2), variant.select_block) * free
    k_cmp = keys.compressed()
    seen = (rows + 1 - variant.compress_block) // variant.compress_stride + 1
    p = probabilities(keys.q_cmp[rows - keys.start], k_cmp, seen)
    got = block_importance(p, HKV, variant, blocks) * free
    weight, tiny = wanted.sum(-1, keepdim=True), torch.finfo(got.dtype).tiny

    def log_share(x: Tensor) -> Tensor:
        return x.clamp(min=tiny).log() - x.sum(-1, keepdim=True).clamp(min=tiny).log()

    return (wanted * (log_share(wanted) - log_share(got))).sum() / weight.sum().clamp(min=tiny)


def free_blocks(config: NSAConfig, rows: Tensor, blocks: int) -> Tensor:
    """(R, blocks): those in the past of the queries `rows` that are not forced."""
    block, own = torch.arange(blocks, device=rows.device), (rows // config.select_block)[:, None]
    return (block >= config.initial_blocks) & (block <= own - config.local_blocks)


def probabilities(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the first seen[i] >= 1 keys, in float32 or better. q: (R, HQ, D); k: (N, HKV, D): (R, HQ, N)."""
    compute = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(compute).unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    logits = torch.einsum("rhgd,nhd->rhgn", grouped, k.to(compute)).flatten(1, 2)
    hidden = torch.arange(k.shape[0], device=q.device) >= seen[:, None, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)
