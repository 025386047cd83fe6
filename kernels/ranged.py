"""Softmax attention over a contiguous range of keys per query, forward and backward, in Triton.

The sliding window and the compressed branch differ only in which keys a query at position p sees, lo(p) <= key < hi(p):

    hi = (p + 1 - l) // d + 1    keys that each stand for l tokens, d apart, wholly in the past (l = d = 1: the tokens)
    lo = p - w + 1               with a window of w tokens, else 0

Rows of a tile are (query, head of the group) pairs, so that a group of any size fills it: with G = 3 a tile of 64 rows
holds 21 queries and a third. Scores are in log2 (log2 e is in the scale), sums in float32, offsets in 64 bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.delta import delta
from nsa_kernels.flash import forward_tiles, key_gradient_tiles, query_gradient_tiles
from nsa_kernels.packing import Ranges
from nsa_kernels.tiles import (
    dot,
    dot_pair,
    last_dense,
    load_pair,
    load_rows,
    load_tile,
    load_tile_pair,
    split_width,
    store_pair,
    store_rows,
    target_of,
)


@triton.jit
def key_range(t, T, S, offset, TOKEN, KEY, L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """The keys lo..hi-1 that query t of T sees. TOKEN, KEY: in a packed batch the first token and the first key of each
    query's sequence, else None.
    """
    position, lo = offset + t, t * 0
    if TOKEN is not None:
        position = t - tl.load(TOKEN + t, mask=t < T, other=0)
        lo = tl.load(KEY + t, mask=t < T, other=0)
    seen = tl.maximum(position + 1 - L + STRIDE, 0) // STRIDE  # (p + 1 - l) // d + 1 without a negative numerator
    hi = tl.minimum(lo + seen, S)
    if WINDOW:
        lo += tl.maximum(position - WINDOW + 1, 0)
    return lo, hi


@triton.jit
def group_rows(base, row, h, stride_t, stride_h, G: tl.constexpr):
    """Addresses of rows (query row // G, head row % G of group h)."""
    return base + (row // G).to(tl.int64) * stride_t + (h * G + row % G).to(tl.int64) * stride_h


@triton.jit(do_not_specialize=["T", "S", "offset"])
def _forward(
    q, k, v, o, lse, TOKEN, KEY, T, S, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < T * G
    lo, hi = key_range(row // G, T, S, offset, TOKEN, KEY, L, STRIDE, WINDOW)
    hi = tl.where(inside, hi, 0)
    q1, q2 = load_pair(group_rows(q, row, h, q_t, q_h, G), inside, D1, D2, D)
    k += h * k_h
    v += h * v_h
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    stop = tl.max(hi)  # what no row sees is not read: it may be anything
    for start in range(tl.min(tl.where(inside, lo, S)) // BN * BN, stop, BN):
        key = start + tl.arange(0, BN)
        k1, k2 = load_tile_pair(k, start, k_s, stop, BN, D1, D2, D)
        s = dot_pair(q1, q2, k1, k2, BM, BN, D2)
        s = tl.where((key >= lo[:, None]) & (key < hi[:, None]), s * scale, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # rows that have seen nothing yet: 2^-inf, not NaN
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        total = total * alpha + tl.sum(p, 1)
        vt = load_tile(v, start, v_s, stop, BN, 0, BDV, DV, True)
        acc = dot(p.to(vt.dtype), vt, acc * alpha[:, None])
        m = top
    safe = tl.where(total > 0, total, 1.0)
    store_rows(group_rows(o, row, h, o_t, o_h, G), inside, acc / safe[:, None], 0, BDV, DV)
    tl.store(lse + h * T * G + row, tl.where(total > 0, m + tl.log2(safe), float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["T", "S", "offset"])
def _backward_q(
    q, k, v, do, lse, delta, dq, TOKEN, KEY, T, S, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dq_t, dq_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq = scale / log2 e * sum over keys of p (dp - delta) k, for one tile of rows."""
    h = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < T * G
    lo, hi = key_range(row // G, T, S, offset, TOKEN, KEY, L, STRIDE, WINDOW)
    hi = tl.where(inside, hi, 0)
    q1, q2 = load_pair(group_rows(q, row, h, q_t, q_h, G), inside, D1, D2, D)
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros([BM, D2], tl.float32)
    g = load_rows(group_rows(do, row, h, o_t, o_h, G), inside, 0, BDV, DV)
    lse_row = tl.load(lse + h * T * G + row, mask=inside, other=0.0)
    delta_row = tl.load(delta + h * T * G + row, mask=inside, other=0.0)
    k += h * k_h
    v += h * v_h
    stop = tl.max(hi)
    for start in range(tl.min(tl.where(inside, lo, S)) // BN * BN, stop, BN):
        key = start + tl.arange(0, BN)
        k1, k2 = load_tile_pair(k, start, k_s, stop, BN, D1, D2, D)
        p = tl.exp2(dot_pair(q1, q2, k1, k2, BM, BN, D2) * scale - lse_row[:, None])
        p = tl.where((key >= lo[:, None]) & (key < hi[:, None]), p, 0.0)
        vt = load_tile(v, start, v_s, stop, BN, 0, BDV, DV, True)
        dp = dot(g, vt.T, tl.zeros([BM, BN], tl.float32))
        ds = (p * (dp - delta_row[:, None])).to(k1.dtype)
        dq1 = dot(ds, k1, dq1)
        if D2 > 0:
            dq2 = dot(ds, k2, dq2)
    scale *= 0.6931471805599453  # the scale holds log2 e
    store_pair(group_rows(dq, row, h, dq_t, dq_h, G), inside, dq1 * scale, dq2 * scale, D1, D2, D)


@triton.jit(do_not_specialize=["T", "S", "offset"])
def _backward_kv(
    q, k, v, do, lse, delta, dk, dv_, TOKEN, KEY, BEGIN, END, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dk_s, dk_h, dv_s, dv_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over all rows of the group that see any: nothing is added atomically."""
    h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BN
    key = first + tl.arange(0, BN)
    k1, k2 = load_tile_pair(k + h * k_h, first, k_s, S, BN, D1, D2, D)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dk2 = dk1
    if D2 > 0:
        dk2 = tl.zeros([BN, D2], tl.float32)
    vt = load_tile(v + h * v_h, first, v_s, S, BN, 0, BDV, DV, True)
    dv = tl.zeros([BN, BDV], tl.float32)
    if BEGIN is None:
        begin, end = tl.maximum(first * STRIDE + L - 1 - offset, 0), T  # the first query that sees the first key
    else:
        begin, end = tl.load(BEGIN + first), tl.load(END + tl.minimum(first + BN, S) - 1)
    if WINDOW:
        end = tl.minimum(end, tl.maximum(first + BN - 1 + WINDOW - offset, 0))
    for start in range(begin * G // BM * BM, end * G, BM):
        row = start + tl.arange(0, BM)
        inside = row < T * G
        lo, hi = key_range(row // G, T, S, offset, TOKEN, KEY, L, STRIDE, WINDOW)
        hi = tl.where(inside, hi, 0)
        q1, q2 = load_pair(group_rows(q, row, h, q_t, q_h, G), inside, D1, D2, D)
        lse_row = tl.load(lse + h * T * G + row, mask=inside, other=0.0)
        p = tl.exp2(dot_pair(k1, k2, q1, q2, BN, BM, D2) * scale - lse_row[None, :])
        p = tl.where((key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :]), p, 0.0)
        g = load_rows(group_rows(do, row, h, o_t, o_h, G), inside, 0, BDV, DV)
        dv = dot(p.to(g.dtype), g, dv)
        dp = dot(vt, g.T, tl.zeros([BN, BM], tl.float32))
        delta_row = tl.load(delta + h * T * G + row, mask=inside, other=0.0)
        ds = (p * (dp - delta_row[None, :])).to(q1.dtype)
        dk1 = dot(ds, q1, dk1)
        if D2 > 0:
            dk2 = dot(ds, q2, dk2)
    scale *= 0.6931471805599453
    there, at = key < S, key.to(tl.int64)
    store_pair(dk + h * dk_h + at * dk_s, there, dk1 * scale, dk2 * scale, D1, D2, D)
    store_rows(dv_ + h * dv_h + at * dv_s, there, dv, 0, BDV, DV)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, offset, scale, block, stride, window, ranges):
        (T, HQ, D), (S, HKV, DV) = q.shape, v.shape
        G, (D1, D2) = HQ // HKV, split_width(D)
        o = q.new_empty(T, HQ, DV)
        lse = torch.empty(HKV, T * G, device=q.device, dtype=torch.float32)
        shape = dict(G=G, D=D, DV=DV, D1=D1, D2=D2, BDV=max(16, triton.next_power_of_2(DV)))
        shape |= dict(L=block, STRIDE=stride, WINDOW=window)
        key = D, DV, q.element_size(), target_of(q)
        tile, options = forward_tiles(*key)
        grid = (triton.cdiv(T * G, tile["BM"]), HKV)
        strides = [x.stride(i) for x in (q, k, v, o) for i in (0, 1)]
        queries = (None, None) if ranges is None else (ranges.token, ranges.key)
        _forward[grid](q, k, v, o, lse, *queries, T, S, offset, scale, *strides, **shape, **tile, **options)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = offset, scale, shape, key, queries, (None, None) if ranges is None else (ranges.begin, ranges.end)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        offset, scale, shape, key, queries, keys = ctx.call
        (T, HQ, _), (S, HKV, _) = q.shape, v.shape
        G, do = HQ // HKV, last_dense(do)
        dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
        strides = [x.stride(i) for x in (q, k, v, do) for i in (0, 1)]
        call = (q, k, v, do, lse, delta(o, do, G))
        at = (T, S, offset, scale, *strides)
        tile, options = query_gradient_tiles(*key)
        grid = (triton.cdiv(T * G, tile["BM"]), HKV)
        _backward_q[grid](*call, dq, *queries, *at, *dq.stride()[:2], **shape, **tile, **options)
        tile, options = key_gradient_tiles(*key)
        grid = (triton.cdiv(S, tile["BN"]), HKV)
        out = (*dk.stride()[:2], *dv.stride()[:2])
        _backward_kv[grid](*call, dk, dv, *queries, *keys, *at, *out, **shape, **tile, **options)
        return dq, dk, dv, None, None, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offset: int = 0,
    scale: float | None = None,
    block: int = 1,
    stride: int = 1,
    window: int = 0,
    ranges: Ranges | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries at offset .. offset+T-1 over keys that stand for `block` tokens, `stride` apart, within
    the last `window` tokens (0 = all); zero where a query sees none.

    q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv), any strides but 1 in the last dimension. ranges: of a packed batch,
    offset 0. Returns o (T, HQ, Dv) and lse (HKV, T * G) in log2, -inf where a query sees none. Differentiable in q, k
    and v.
    """
    scale = math.log2(math.e) * (q.shape[2] ** -0.5 if scale is None else scale)
    return _Attention.apply(q, k, v, offset, scale, block, stride, window, ranges)
