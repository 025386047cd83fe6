"""NSA on a GPU: the Triton kernels put together, with the signatures of `reference`."""

import torch
from torch import Tensor

from nsa_kernels import ranged, selected
from nsa_kernels.combine import combine
from nsa_kernels.flash import flash_attention
from nsa_kernels.packing import Packing
from nsa_kernels.reference import compress
from nsa_kernels.select import select_blocks
from nsa_kernels.tiles import last_dense
from nsa_kernels.variant import Variant

__all__ = ["compress", "dense_attention", "nsa_attention"]


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
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """All three branches; shapes and results as in `dispatch.nsa_attention`. Differentiable."""
    S = offset + q.shape[0]
    NC, q_cmp = k_cmp.shape[0] if packing else variant.compressed_count(S), q if q_cmp is None else q_cmp
    k, v, k_cmp, v_cmp = k[:S], v[:S], k_cmp[:NC], v_cmp[:NC]
    k_swa, v_swa = k if k_swa is None else k_swa[:S], v if v_swa is None else v_swa[:S]
    # Products take operands of one type; a cache may keep a narrower one than the model computes in.
    q, q_cmp, k, v, k_cmp, v_cmp, k_swa, v_swa = (
        last_dense(x.to(q.dtype)) for x in (q, q_cmp, k, v, k_cmp, v_cmp, k_swa, v_swa)
    )
    at = dict(offset=offset, scale=scale)
    blocks = dict(block=variant.compress_block, stride=variant.compress_stride)
    o_cmp, lse = ranged.attention(q_cmp, k_cmp, v_cmp, **blocks, **at, ranges=packing and packing.compressed)
    if variant.topk == "exact" and variant.block_count(S) <= variant.select_count:
        chosen = _all_blocks(q, k.shape[1], variant, offset, packing)
        bounds = {} if packing is None else dict(cu_seqlens=packing.cu_seqlens, max_seqlen=S)
        o_slc = flash_attention(q, k, v, **at, **bounds)
    else:
        chosen = select_blocks(q_cmp.detach(), k_cmp.detach(), lse, variant, **at, packing=packing)
        o_slc = selected.attention(q, k, v, chosen, variant.select_block, **at, packing=packing)
    # Apart from the selected branch: rows of 8 queries (G = 16) share a tile of the window's keys, where a query of the
    # selected branch would read 512 keys of its own, half as much again as its blocks.
    o_swa = None
    if variant.window:
        o_swa, _ = ranged.attention(q, k_swa, v_swa, window=variant.window, **at, ranges=packing and packing.window)
    return combine(o_cmp, o_slc, o_swa, gates), chosen


def _all_blocks(q: Tensor, heads: int, variant: Variant, offset: int, packing: Packing | None) -> Tensor:
    """What is chosen while n blocks cover the context, (T, HKV, n): every block that a query may see. The selected
    branch is dense attention then.
    """
    block = torch.arange(variant.select_count, device=q.device, dtype=torch.int32)
    position = torch.arange(offset, offset + q.shape[0], device=q.device) if packing is None else packing.position
    current = position[:, None] // variant.select_block
    return torch.where(block <= current, block, -1)[:, None].expand(-1, heads, -1).contiguous()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, offset: int = 0, scale: float | None = None) -> Tensor:
    """Causal full attention. Shapes as in `reference.dense_attention`."""
    return flash_attention(q, k.to(q.dtype), v.to(q.dtype), offset=offset, scale=scale)
