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

from nsa_kernels.tiles import target_of


@triton.jit
def _range(position, S, L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """The keys lo..hi-1 that a query at `position` sees."""
    seen = tl.maximum(position + 1 - L + STRIDE, 0) // STRIDE  # (p + 1 - l) // d + 1 without a negative numerator
    hi = tl.minimum(seen, S)
    lo = tl.maximum(position - WINDOW + 1, 0) if WINDOW else position * 0
    return lo, hi


@triton.jit
def _rows(base, row, h, stride_t, stride_h, G: tl.constexpr):
    """Addresses of rows (query row // G, head row % G of group h)."""
    return base + (row // G).to(tl.int64) * stride_t + (h * G + row % G).to(tl.int64) * stride_h


@triton.jit
def _forward(
    q, k, v, o, lse, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    row = tl.program_id(0) * M + tl.arange(0, M)
    inside = row < T * G
    lo, hi = _range(offset + row // G, S, L, STRIDE, WINDOW)
    hi = tl.where(inside, hi, 0)
    d, dv = tl.arange(0, PD), tl.arange(0, PV)
    x = tl.load(_rows(q, row, h, q_t, q_h, G)[:, None] + d, mask=inside[:, None] & (d < D), other=0.0)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, PV], tl.float32)
    first = tl.min(tl.where(inside, lo, S)) // N * N
    for start in range(first, tl.max(hi), N):
        key = start + tl.arange(0, N)
        at = key.to(tl.int64)
        kt = tl.load(
            k + h.to(tl.int64) * k_h + at[None, :] * k_s + d[:, None], mask=(key < S) & (d[:, None] < D), other=0.0
        )
        s = tl.dot(x, kt, input_precision=PRECISION) * scale
        s = tl.where((key >= lo[:, None]) & (key < hi[:, None]), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # rows that have seen nothing yet: 2^-inf, not NaN
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        total = total * alpha + tl.sum(p, 1)
        vt = tl.load(v + h.to(tl.int64) * v_h + at[:, None] * v_s + dv, mask=(key < S)[:, None] & (dv < DV), other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(vt.dtype), vt, input_precision=PRECISION)
        m = top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(_rows(o, row, h, o_t, o_h, G)[:, None] + dv, acc.to(o.dtype.element_ty), mask=inside[:, None] & (dv < DV))
    value = tl.where(total > 0, m + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse + h.to(tl.int64) * T * G + row, value, mask=inside)


@triton.jit
def _backward_q(
    q, k, v, do, lse, delta, dq, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dq_t, dq_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale / log2 e * sum over keys of p (dp - delta) k, for one tile of rows."""
    h = tl.program_id(1)
    row = tl.program_id(0) * M + tl.arange(0, M)
    inside = row < T * G
    lo, hi = _range(offset + row // G, S, L, STRIDE, WINDOW)
    hi = tl.where(inside, hi, 0)
    d, dv = tl.arange(0, PD), tl.arange(0, PV)
    x = tl.load(_rows(q, row, h, q_t, q_h, G)[:, None] + d, mask=inside[:, None] & (d < D), other=0.0)
    g = tl.load(_rows(do, row, h, o_t, o_h, G)[:, None] + dv, mask=inside[:, None] & (dv < DV), other=0.0)
    at_row = h.to(tl.int64) * T * G + row
    lse_row = tl.load(lse + at_row, mask=inside, other=0.0)
    delta_row = tl.load(delta + at_row, mask=inside, other=0.0)
    acc = tl.zeros([M, PD], tl.float32)
    first = tl.min(tl.where(inside, lo, S)) // N * N
    for start in range(first, tl.max(hi), N):
        key = start + tl.arange(0, N)
        at = key.to(tl.int64)
        kt = tl.load(k + h.to(tl.int64) * k_h + at[:, None] * k_s + d, mask=(key < S)[:, None] & (d < D), other=0.0)
        vt = tl.load(v + h.to(tl.int64) * v_h + at[:, None] * v_s + dv, mask=(key < S)[:, None] & (dv < DV), other=0.0)
        s = tl.dot(x, tl.trans(kt), input_precision=PRECISION) * scale
        seen = (key >= lo[:, None]) & (key < hi[:, None])
        p = tl.where(seen, tl.exp2(s - lse_row[:, None]), 0.0)
        dp = tl.dot(g, tl.trans(vt), input_precision=PRECISION)
        ds = p * (dp - delta_row[:, None])
        acc += tl.dot(ds.to(kt.dtype), kt, input_precision=PRECISION)
    acc *= scale * 0.6931471805599453  # the scale holds log2 e
    tl.store(_rows(dq, row, h, dq_t, dq_h, G)[:, None] + d, acc.to(dq.dtype.element_ty), mask=inside[:, None] & (d < D))


@triton.jit
def _backward_kv(
    q, k, v, do, lse, delta, dk, dv_, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dk_s, dk_h, dv_s, dv_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over all rows of the group that see any: nothing is added atomically."""
    h = tl.program_id(1)
    first_key = tl.program_id(0) * N
    key = first_key + tl.arange(0, N)
    at = key.to(tl.int64)
    d, dv = tl.arange(0, PD), tl.arange(0, PV)
    kt = tl.load(k + h.to(tl.int64) * k_h + at[:, None] * k_s + d, mask=(key < S)[:, None] & (d < D), other=0.0)
    vt = tl.load(v + h.to(tl.int64) * v_h + at[:, None] * v_s + dv, mask=(key < S)[:, None] & (dv < DV), other=0.0)
    dk_acc = tl.zeros([N, PD], tl.float32)
    dv_acc = tl.zeros([N, PV], tl.float32)
    begin = tl.maximum(first_key * STRIDE + L - 1 - offset, 0) * G  # the first row that sees the first key
    end = T * G
    if WINDOW:
        end = tl.minimum(end, tl.maximum(first_key + N - 1 + WINDOW - offset, 0) * G)
    for start in range(begin // M * M, end, M):
        row = start + tl.arange(0, M)
        inside = row < T * G
        lo, hi = _range(offset + row // G, S, L, STRIDE, WINDOW)
        x = tl.load(_rows(q, row, h, q_t, q_h, G)[:, None] + d, mask=inside[:, None] & (d < D), other=0.0)
        g = tl.load(_rows(do, row, h, o_t, o_h, G)[:, None] + dv, mask=inside[:, None] & (dv < DV), other=0.0)
        at_row = h.to(tl.int64) * T * G + row
        lse_row = tl.load(lse + at_row, mask=inside, other=0.0)
        delta_row = tl.load(delta + at_row, mask=inside, other=0.0)
        s = tl.dot(x, tl.trans(kt), input_precision=PRECISION) * scale
        seen = inside[:, None] & (key >= lo[:, None]) & (key < hi[:, None])
        p = tl.where(seen, tl.exp2(s - lse_row[:, None]), 0.0)
        dv_acc += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(vt), input_precision=PRECISION)
        ds = p * (dp - delta_row[:, None])
        dk_acc += tl.dot(tl.trans(ds.to(x.dtype)), x, input_precision=PRECISION)
    dk_acc *= scale * 0.6931471805599453
    to = h.to(tl.int64) * dk_h + at[:, None] * dk_s + d
    tl.store(dk + to, dk_acc.to(dk.dtype.element_ty), mask=(key < S)[:, None] & (d < D))
    to = h.to(tl.int64) * dv_h + at[:, None] * dv_s + dv
    tl.store(dv_ + to, dv_acc.to(dv_.dtype.element_ty), mask=(key < S)[:, None] & (dv < DV))


def tiles(D: int, DV: int, target: str) -> dict[str, int]:
    """Tile sizes and launch settings: rows, keys, padded widths. With D = 128 on an NVIDIA GPU 128 x 64 takes 48 KB of
    shared memory forward and 113 KB backward, of 163 on sm_80; wider heads halve both, and so does AMD's gfx942, which
    has 64 KB.
    """
    hip = target.startswith("hip")
    padded = dict(PD=max(16, triton.next_power_of_2(D)), PV=max(16, triton.next_power_of_2(DV)))
    small = hip or max(D, DV) > 128
    rows = dict(M=64, N=32, num_warps=4 if hip else 8) if small else dict(M=128, N=64, num_warps=4)
    return rows | dict(num_stages=1 if hip else 2) | padded


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # of float32 products only; others ignore it


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, offset, scale, block, stride, window, tile):
        (T, HQ, D), (S, HKV, DV) = q.shape, v.shape
        G = HQ // HKV
        o = q.new_empty(T, HQ, DV)
        lse = torch.empty(HKV, T * G, device=q.device, dtype=torch.float32)
        shape = dict(G=G, D=D, DV=DV, L=block, STRIDE=stride, WINDOW=window, PRECISION=_precision(q), **tile)
        grid = (triton.cdiv(T * G, tile["M"]), HKV)
        strides = [x.stride(i) for x in (q, k, v) for i in (0, 1)]
        _forward[grid](q, k, v, o, lse, T, S, offset, scale, *strides, *o.stride()[:2], **shape)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = offset, scale, shape
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        offset, scale, shape = ctx.call
        (T, HQ, _), (S, HKV, _) = q.shape, v.shape
        G, do = HQ // HKV, do.contiguous()
        delta = (do.float() * o.float()).sum(-1).view(T, HKV, G).transpose(0, 1).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        strides = [x.stride(i) for x in (q, k, v, do) for i in (0, 1)]
        call = (q, k, v, do, lse, delta)
        rows = (triton.cdiv(T * G, shape["M"]), HKV)
        _backward_q[rows](*call, dq, T, S, offset, scale, *strides, *dq.stride()[:2], **shape)
        keys = (triton.cdiv(S, shape["N"]), HKV)
        _backward_kv[keys](*call, dk, dv, T, S, offset, scale, *strides, *dk.stride()[:2], *dv.stride()[:2], **shape)
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
    tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries at offset .. offset+T-1 over keys that stand for `block` tokens, `stride` apart, within
    the last `window` tokens (0 = all); zero where a query sees none.

    q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv), any strides but 1 in the last dimension. Returns o (T, HQ, Dv) and
    lse (HKV, T * G) in log2, -inf where a query sees none. Differentiable in q, k and v.
    """
    scale = math.log2(math.e) * (q.shape[2] ** -0.5 if scale is None else scale)
    tile = tiles(q.shape[2], v.shape[2], target_of(q)) | (tile or {})
    return _Attention.apply(q, k, v, offset, scale, block, stride, window, tile)
