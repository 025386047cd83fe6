"""NSA on a CPU with gradients: every branch is PyTorch's own attention under a mask of what the branch reads.

The work grows with the square of the length, as dense attention's does, but nothing of that size is kept: PyTorch's
kernel computes the scores again in its backward pass. Autograd through `reference` keeps them: forward and backward
of the built-in model (30 layers, 9 heads of 64, bfloat16, 2 cores) took 46 s at 2,048 tokens and more than 23 GB at
4,096; this takes 7 s, and 20 s at 4,096.

Same signatures and results as `reference`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from nsa_kernels import reference
from nsa_kernels.reference import compress
from nsa_kernels.variant import Variant

__all__ = ["compress", "dense_attention", "nsa_attention"]

ROWS = 1024  # queries of one call: keys that lie after all of them are not read; masks take 3 MB a head at 1,024 keys


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    variant: Variant,
    *,
    offset: int = 0,
    scale: float | None = None,
    q_cmp: Tensor | None = None,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All three branches; shapes and results as in `reference.nsa_attention`."""
    q_cmp = q if q_cmp is None else q_cmp
    k_swa, v_swa = k if k_swa is None else k_swa, v if v_swa is None else v_swa
    outputs = [q.new_empty(0, q.shape[1], v.shape[-1])]  # a batch may hold a sequence of no tokens
    indices = [torch.empty(0, k.shape[1], variant.select_count, dtype=torch.int32)]
    for rows in _pieces(q.shape[0]):
        first, S = offset + rows.start, offset + rows.stop
        NC = variant.compressed_count(S)
        chosen = _choose(q_cmp[rows], k_cmp[:NC], k.shape[1], variant, first, scale)
        position = torch.arange(first, S)[:, None]
        g_cmp, g_slc, g_swa = gates[rows].unsqueeze(-1).unbind(2)  # each (R, HQ, 1)
        o = q.new_zeros(S - first, q.shape[1], v.shape[-1])
        if _is_open(g_cmp):
            o = o + g_cmp * _compressed(q_cmp[rows], k_cmp[:NC], v_cmp[:NC], variant, position, scale)
        if _is_open(g_slc):
            tokens = reference.tokens_of(chosen, variant, S).transpose(0, 1)[:, None]  # (HKV, 1, R, S)
            visible = tokens & (torch.arange(S) <= position)
            o = o + g_slc * _attend(q[rows], k[:S], v[:S], visible, scale)
        if variant.window and _is_open(g_swa):
            low = max(0, first - variant.window + 1)
            token = torch.arange(low, S)
            visible = (token <= position) & (token > position - variant.window)
            o = o + g_swa * _attend(q[rows], k_swa[low:S], v_swa[low:S], visible, scale)
        outputs.append(o)
        indices.append(chosen)
    return torch.cat(outputs), torch.cat(indices)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, offset: int = 0, scale: float | None = None) -> Tensor:
    """Causal full attention. Shapes as in `reference.dense_attention`."""
    outputs = [q.new_empty(0, q.shape[1], v.shape[-1])]
    for rows in _pieces(q.shape[0]):
        S = offset + rows.stop
        causal = torch.arange(S) <= torch.arange(offset + rows.start, S)[:, None]
        outputs.append(_attend(q[rows], k[:S], v[:S], causal, scale))
    return torch.cat(outputs)


def _pieces(T: int) -> list[slice]:
    return [slice(start, min(start + ROWS, T)) for start in range(0, T, ROWS)]


def _is_open(gate: Tensor) -> bool:
    """Whether a branch counts: a gate of 2^-20 moves a sum by 1/2048 of what bfloat16 rounds off."""
    closed = 2.0**-20 if gate.dtype == torch.bfloat16 else 0.0
    return not bool((gate <= closed).all())


@torch.no_grad()
def _choose(q: Tensor, k_cmp: Tensor, HKV: int, variant: Variant, first: int, scale: float | None) -> Tensor:
    """The chosen blocks (R, HKV, n) of R queries from position `first` on, compared in float32."""
    q, k_cmp = q.float(), k_cmp.float()
    p = reference.compressed_attention(q, k_cmp, k_cmp[..., :1], variant, first, scale)[1]
    importance = reference.block_importance(p, HKV, variant, variant.block_count(first + q.shape[0]))
    return reference.select_blocks(importance, variant, first)


def _compressed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, variant: Variant, position: Tensor, scale: float | None
) -> Tensor:
    """o_cmp (R, HQ, Dv); zero for the first queries, which see no block yet."""
    ends = torch.arange(k_cmp.shape[0]) * variant.compress_stride + variant.compress_block - 1
    visible = ends <= position
    blind = int((~visible.any(1)).sum())
    if blind == q.shape[0]:
        return q.new_zeros(*q.shape[:2], v_cmp.shape[-1])
    o = _attend(q[blind:], k_cmp, v_cmp, visible[blind:], scale)
    return functional.pad(o, (0, 0, 0, 0, blind, 0))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """Softmax attention under a mask (R, S) or (HKV, 1, R, S); every query sees a key."""
    R, HQ, D = q.shape
    HKV = k.shape[1]
    grouped = q.view(R, HKV, -1, D).permute(1, 2, 0, 3)  # (HKV, G, R, D)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    o = functional.scaled_dot_product_attention(grouped, k, v, visible, scale=scale)
    return o.permute(2, 0, 1, 3).reshape(R, HQ, -1)
