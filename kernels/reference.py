"""NSA in plain PyTorch, the equations of arXiv 2502.11089 in their order: the truth that every fast path must match.

Works in any float dtype (float64 for the tests), differentiable, clear rather than quick: it holds (T, NC) scores.

Shapes: T queries at positions offset .. offset+T-1, S = offset+T keys; HQ query heads in groups of G = HQ/HKV that
share one key head; NC compression blocks, NB selection blocks. `block_indices` is -1 where fewer blocks exist.
"""

import torch
from torch import Tensor

from nsa_kernels.packing import Packing
from nsa_kernels.variant import Variant

Phi = None | Tensor | tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


def compress(
    x: Tensor, variant: Variant, phi: Phi = None, position: Tensor | None = None, packing: Packing | None = None
) -> Tensor:
    """Eq. 7: one vector for every block of l tokens that starts at a multiple of d and is complete.

    x: (S, HKV, D). phi: None = mean; (HKV, l*D, Do) = linear; (up, up_bias, down, down_bias) = MLP with SiLU;
    (score, bias, weight), of (HKV, D), (HKV, l), (HKV, D, Do) = the mean with weights softmax_i(score . x_i + bias_i),
    then a linear map. position: (HKV, l, D), added before phi. Returns (NC, HKV, Do); of a packed batch one sequence's
    after the other's, and then rows that are none's.
    """
    l, d = variant.compress_block, variant.compress_stride
    if x.shape[0] < l:
        return x.new_empty(0, x.shape[1], _phi_width(phi, x.shape[2]))
    if packing is None:
        blocks = x.unfold(0, l, d).transpose(2, 3)  # (NC, HKV, l, D)
    else:
        token = packing.key_token[:, None] + torch.arange(l, device=x.device)
        blocks = x[token.clamp(max=x.shape[0] - 1)].transpose(1, 2)
    if position is not None:
        blocks = blocks + position
    if phi is None:
        return blocks.mean(2)
    if isinstance(phi, tuple) and len(phi) == 3:
        score, bias, weight = phi
        return torch.einsum("chd,hdo->cho", _pooled(blocks, score, bias), weight)
    flat = blocks.flatten(2)  # (NC, HKV, l*D)
    if isinstance(phi, Tensor):
        return torch.einsum("chi,hio->cho", flat, phi)
    up, up_bias, down, down_bias = phi
    hidden = torch.nn.functional.silu(torch.einsum("chi,hif->chf", flat, up) + up_bias)
    return torch.einsum("chf,hfo->cho", hidden, down) + down_bias


def _pooled(blocks: Tensor, score: Tensor, bias: Tensor) -> Tensor:
    """sum_i w_i x_i over the tokens of a block, w = softmax_i(score . x_i + bias_i) in float32 or better.

    blocks: (NC, HKV, l, D); score: (HKV, D); bias: (HKV, l). Returns (NC, HKV, D) in the blocks' type.
    """
    wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    logits = torch.einsum("chld,hd->chl", wide, score.to(wide.dtype)) + bias
    return torch.einsum("chl,chld->chd", logits.softmax(-1), wide).to(blocks.dtype)


def _phi_width(phi: Phi, default: int) -> int:
    if phi is None:
        return default
    return phi.shape[-1] if isinstance(phi, Tensor) else phi[-1].shape[-1]


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, variant: Variant, offset: int = 0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 8 and the compressed branch: softmax over the compression blocks wholly in the query's past.

    q: (T, HQ, D); k_cmp: (NC, HKV, D); v_cmp: (NC, HKV, Dv). Returns o_cmp (T, HQ, Dv), p_cmp (T, HQ, NC);
    both are zero for a query that sees no block yet.
    """
    l, d = variant.compress_block, variant.compress_stride
    ends = torch.arange(k_cmp.shape[0], device=q.device) * d + l - 1  # last token of each block
    visible = ends[None, :] <= _positions(q, offset)[:, None]  # (T, NC)
    return _attend(q, k_cmp, v_cmp, visible[:, None, :], scale)


def block_importance(p_cmp: Tensor, num_kv_heads: int, variant: Variant, num_blocks: int) -> Tensor:
    """Eq. 9 (compression blocks -> selection blocks) and eq. 10 (sum over the heads of a group).

    p_cmp: (T, HQ, NC). Returns (T, HKV, NB).
    """
    T, HQ, NC = p_cmp.shape
    group = p_cmp.reshape(T, num_kv_heads, HQ // num_kv_heads, NC).sum(2)
    importance = group.new_zeros(T, num_kv_heads, num_blocks)
    start = torch.arange(num_blocks, device=p_cmp.device) * (variant.select_block // variant.compress_stride)
    for offset, weight in variant.importance_weights.items():
        index = start + offset
        inside = (index >= 0) & (index < NC)
        importance[..., inside] += weight * group[..., index[inside]]
    return importance


def select_blocks(importance: Tensor, variant: Variant, offset: int = 0) -> Tensor:
    """Eq. 11 and 12: the forced blocks and the most important others, n in all, in ascending order.

    importance: (T, HKV, NB). Returns block_indices (T, HKV, n) int32, -1 at the end where fewer blocks exist.
    """
    T, HKV, NB = importance.shape
    n = variant.select_count
    block = torch.arange(NB, device=importance.device)
    current = (_positions(importance, offset) // variant.select_block)[:, None]  # (T, 1)
    forced = (block < variant.initial_blocks) | (block > current - variant.local_blocks)
    score = importance.masked_fill(forced[:, None, :], torch.inf)
    score = score.masked_fill((block > current)[:, None, :], -torch.inf)
    if variant.topk == "exact":
        chosen = _top(score, n)
    else:
        # fla merges chunk by chunk and keeps half of each side: in the end the best n/2 of all earlier
        # chunks and the best n/2 of the query's own chunk (nsa_1B: 16 blocks a chunk).
        own = (block // variant.topk_chunk) == (current // variant.topk_chunk)  # (T, NB)
        chosen = torch.cat(
            [
                _top(score.masked_fill(own[:, None, :], -torch.inf), n // 2),
                _top(score.masked_fill(~own[:, None, :], -torch.inf), n // 2),
            ],
            -1,
        )
    chosen = chosen.masked_fill(chosen < 0, NB).sort(-1).values
    return chosen.masked_fill(chosen == NB, -1).to(torch.int32)


def _top(score: Tensor, n: int) -> Tensor:
    """Indices of the n largest finite-or-forced scores along the last axis, -1 where there are fewer."""
    value, index = score.topk(min(n, score.shape[-1]), -1)
    index = index.masked_fill(value == -torch.inf, -1)
    return torch.nn.functional.pad(index, (0, n - index.shape[-1]), value=-1)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    variant: Variant,
    offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """The selected branch: causal softmax over the tokens of the chosen blocks.

    q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv); block_indices: (T, HKV, n). Returns o_slc (T, HQ, Dv).
    """
    S = k.shape[0]
    causal = torch.arange(S, device=q.device) <= _positions(q, offset)[:, None]
    return _attend(q, k, v, tokens_of(block_indices, variant, S) & causal[:, None, :], scale)[0]


def tokens_of(block_indices: Tensor, variant: Variant, S: int) -> Tensor:
    """(T, HKV, S): whether a token belongs to one of the chosen blocks (T, HKV, n)."""
    T, HKV, _ = block_indices.shape
    NB = variant.block_count(S)
    chosen = torch.zeros(T, HKV, NB + 1, dtype=torch.bool, device=block_indices.device)
    chosen.scatter_(2, block_indices.long() % (NB + 1), True)  # -1 lands in the extra column
    return chosen[..., :NB].repeat_interleave(variant.select_block, -1)[..., :S]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, variant: Variant, offset: int = 0, scale: float | None = None
) -> Tensor:
    """The sliding window branch: causal softmax over the last w tokens, the query's own included.

    q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv). Returns o_swa (T, HQ, Dv), zero when w = 0.
    """
    position = _positions(q, offset)[:, None]
    token = torch.arange(k.shape[0], device=q.device)
    visible = (token <= position) & (token > position - variant.window)
    return _attend(q, k, v, visible[:, None, :], scale)[0]


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
    """Eq. 5: o = g_cmp o_cmp + g_slc o_slc + g_swa o_swa.

    q: (T, HQ, D); k: (S, HKV, D), v: (S, HKV, Dv) of the selected branch with S >= offset + T (later keys are
    ignored); k_cmp, v_cmp: (NC, HKV, D | Dv); gates: (T, HQ, 3) after the sigmoid, order cmp, slc, swa. q_cmp:
    queries of the compressed branch where they differ (un-roped compression); k_swa, v_swa: keys of the window
    branch where it has its own. Returns o (T, HQ, Dv) and block_indices (T, HKV, n) int32.
    """
    HKV, S = k.shape[1], offset + q.shape[0]
    NC = variant.compressed_count(S)
    k, v, k_cmp, v_cmp = k[:S], v[:S], k_cmp[:NC], v_cmp[:NC]
    k_swa, v_swa = k if k_swa is None else k_swa[:S], v if v_swa is None else v_swa[:S]
    o_cmp, p_cmp = compressed_attention(q if q_cmp is None else q_cmp, k_cmp, v_cmp, variant, offset, scale)
    importance = block_importance(p_cmp.detach(), HKV, variant, variant.block_count(S))
    block_indices = select_blocks(importance, variant, offset)
    o_slc = selected_attention(q, k, v, block_indices, variant, offset, scale)
    o_swa = window_attention(q, k_swa, v_swa, variant, offset, scale)
    g_cmp, g_slc, g_swa = gates.unsqueeze(-1).unbind(2)  # each (T, HQ, 1)
    return g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa, block_indices


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, offset: int = 0, scale: float | None = None) -> Tensor:
    """Causal full attention, what NSA is compared with. Shapes as in `nsa_attention`; returns (T, HQ, Dv)."""
    causal = torch.arange(k.shape[0], device=q.device) <= _positions(q, offset)[:, None]
    return _attend(q, k, v, causal[:, None, :], scale)[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention under a mask (T, 1 | HKV, S); o and p are zero where nothing is visible."""
    T, HQ, D = q.shape
    HKV = k.shape[1]
    scale = D**-0.5 if scale is None else scale
    grouped = q.reshape(T, HKV, HQ // HKV, D)
    logits = torch.einsum("thgd,shd->thgs", grouped, k) * scale
    logits = logits.masked_fill(~visible[:, :, None, :], -torch.inf)
    # A row without a visible key has lse = -inf; 0 in its place makes p = exp(-inf) = 0 instead of NaN.
    lse = logits.logsumexp(-1, keepdim=True) if k.shape[0] else logits.new_zeros(T, HKV, HQ // HKV, 1)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0))
    o = torch.einsum("thgs,shd->thgd", p, v)
    return o.reshape(T, HQ, v.shape[-1]), p.reshape(T, HQ, k.shape[0])


def _positions(x: Tensor, offset: int) -> Tensor:
    return torch.arange(offset, offset + x.shape[0], device=x.device)
