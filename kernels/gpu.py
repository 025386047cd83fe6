"""NSA on a GPU: the Triton kernels put together, with the signatures of `reference`."""

from torch import Tensor

from nsa_kernels import ranged, selected
from nsa_kernels.flash import flash_attention
from nsa_kernels.reference import compress
from nsa_kernels.select import select_blocks
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
) -> tuple[Tensor, Tensor]:
    """All three branches; shapes and results as in `reference.nsa_attention`. Differentiable."""
    S = offset + q.shape[0]
    NC, q_cmp = variant.compressed_count(S), q if q_cmp is None else q_cmp
    k, v, k_cmp, v_cmp = k[:S], v[:S], k_cmp[:NC], v_cmp[:NC]
    k_swa, v_swa = k if k_swa is None else k_swa[:S], v if v_swa is None else v_swa[:S]
    at = dict(offset=offset, scale=scale)
    o_cmp, lse = ranged.attention(
        q_cmp, k_cmp, v_cmp, block=variant.compress_block, stride=variant.compress_stride, **at
    )
    chosen = select_blocks(q_cmp.detach(), k_cmp.detach(), lse, variant, **at)
    o = gates[..., 0, None] * o_cmp + gates[..., 1, None] * selected.attention(
        q, k, v, chosen, variant.select_block, **at
    )
    if variant.window:
        o = o + gates[..., 2, None] * ranged.attention(q, k_swa, v_swa, window=variant.window, **at)[0]
    return o, chosen


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, offset: int = 0, scale: float | None = None) -> Tensor:
    """Causal full attention. Shapes as in `reference.dense_attention`."""
    return flash_attention(q, k, v, offset=offset, scale=scale)
