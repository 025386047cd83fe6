"""Enter one token per sequence into the caches, on the device: rotate, write, compress the block it completes.

What comes before `decode_attention` in a captured step, so lengths are read on the device here as well. Three launches
where torch would need some twenty (a rotation alone is seven), at about 2 us each within a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.reference import Phi
from nsa_kernels.tiles import last_dense
from nsa_kernels.variant import Variant


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Write k and v as the last token of each sequence and return q, both rotated to that token's position.

    q: (B, HQ, D); k: (B, HKV, D); v: (B, HKV, Dv); caches: (B, HKV, capacity, D | Dv), any strides; lengths: (B,) int32
    on the device, the new token included; 0 = nothing is written. cos, sin: (positions, D/2), None = no rotation.
    """
    (B, HQ, D), (_, HKV, Dv) = q.shape, v.shape
    if k_cache.shape[:2] != (B, HKV) or v_cache.shape[-1] != Dv or k_cache.stride(-1) * v_cache.stride(-1) != 1:
        raise ValueError(
            f"caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not fit k and v of {B} x {HKV} heads"
        )
    if cos is not None and (D % 2 or cos.shape[1] != D // 2):
        raise ValueError(f"cos {tuple(cos.shape)} does not fit heads of {D}")
    q, k, v = last_dense(q), last_dense(k), last_dense(v)
    rotated = torch.empty(B, HQ, D, device=q.device, dtype=q.dtype)
    G, half = HQ // HKV, triton.cdiv(D, 2)
    _append[HKV, B](
        q, k, v, rotated, k_cache, v_cache, cos, sin, lengths,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        G=G, GP=triton.next_power_of_2(G), D=D, HALF=half, HP=triton.next_power_of_2(half), DV=Dv,
        BDV=triton.next_power_of_2(Dv), num_warps=1,
    )  # fmt: skip
    return rotated


def compress_newest(
    x: Tensor,
    x_cmp: Tensor,
    lengths: Tensor,
    variant: Variant,
    phi: Phi = None,
    position: Tensor | None = None,
    *,
    undo: tuple[Tensor, Tensor] | None = None,
    rotate: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Where the last token of a sequence completes a compression block, write it to x_cmp (`reference.compress`).

    x: (B, HKV, capacity, D); x_cmp: (B, HKV, compressed capacity, Do); phi and position as in `reference.compress`.
    undo: cos, sin (positions, D/2) by which x was rotated, where phi takes it as it was before. rotate: cos, sin by
    which the result is, at its block's first token.
    """
    if phi is None or isinstance(phi, Tensor):
        _newest(x, x_cmp, phi, None, position, undo, rotate, lengths, variant, rows=variant.compress_block)
        return
    hidden = x.new_empty(*x.shape[:2], 1, phi[0].shape[-1], dtype=torch.float32)
    if len(phi) == 3:
        score, bias, weight = phi
        last = weight, None
        _pool(x, hidden, score, bias, position, undo, lengths, variant)
    else:
        up, up_bias, *last = phi
        _newest(x, hidden, up, up_bias, position, undo, None, lengths, variant, rows=variant.compress_block, silu=True)
    _newest(hidden, x_cmp, *last, None, None, rotate, lengths, variant, rows=1)


def _pool(x, y, score, bias, position, undo, lengths, variant: Variant) -> None:
    B, HKV, _, width = x.shape
    if undo and width % 2:
        raise ValueError(f"a head of {width} cannot be rotated")
    score, bias, position = (None if t is None else t.contiguous() for t in (score, bias, position))
    L = variant.compress_block
    LP, BW = triton.next_power_of_2(L), triton.next_power_of_2(width)
    _pool_newest[HKV, B](
        x, y, score, bias, position, *(undo or (None, None)), lengths, *x.stride()[:3], *y.stride()[:2],
        L=L, LP=LP, STRIDE=variant.compress_stride, WIDTH=width, BW=BW,
        num_warps=min(16, max(4, LP * BW // 2048)),  # a block in registers, 64 a thread: 128 spilled
    )  # fmt: skip


def _newest(x, y, weight, bias, position, undo, rotate, lengths, variant: Variant, *, rows: int, silu=False) -> None:
    B, HKV, _, width = x.shape
    out = y.shape[-1]
    if (undo and width % 2) or (rotate and out % 2):
        raise ValueError(f"a head of {width} or {out} cannot be rotated")
    weight, bias, position = (None if t is None else t.contiguous() for t in (weight, bias, position))
    half = triton.cdiv(out, 2)
    BO = min(32, triton.next_power_of_2(half))
    _compress_newest[triton.cdiv(half, BO), HKV, B](
        x, y, weight, bias, position, *(undo or (None, None)), *(rotate or (None, None)), lengths,
        *x.stride()[:3], *y.stride()[:3],
        L=variant.compress_block, STRIDE=variant.compress_stride, ROWS=rows, FROM_CACHE=rows > 1 or x.shape[2] > 1,
        TO_CACHE=not silu, SILU=silu, WIDTH=width, OUT=out, HALF=half, BO=BO,
        BC=min(64, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip


@triton.jit
def _turn(COS, SIN, position, a, b, column, mask, HALF: tl.constexpr):
    """Rotate the pair (i, i + D/2) as `position` says."""
    cos = tl.load(COS + position * HALF + column, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + position * HALF + column, mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _append(
    Q, K, V, ROTATED, KC, VC, COS, SIN, LENGTHS, sq_b, sq_h, sk_b, sk_h, sv_b, sv_h, skc_b, skc_h, skc_t, svc_b, svc_h,
    svc_t, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr,
):  # fmt: skip
    """One key head of one sequence and its G queries."""
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(LENGTHS + b)
    position = tl.maximum(length - 1, 0).to(tl.int64)
    i, g = tl.arange(0, HP), tl.arange(0, GP)
    low, high = i < HALF, i + HALF < D
    q = Q + b * sq_b + (h * G + g)[:, None] * sq_h + i[None, :]
    q_low, q_high = (g < G)[:, None] & low[None, :], (g < G)[:, None] & high[None, :]
    qa = tl.load(q, mask=q_low, other=0.0).to(tl.float32)
    qb = tl.load(q + HALF, mask=q_high, other=0.0).to(tl.float32)
    k = K + b * sk_b + h * sk_h + i
    ka = tl.load(k, mask=low, other=0.0).to(tl.float32)
    kb = tl.load(k + HALF, mask=high, other=0.0).to(tl.float32)
    if COS is not None:
        qa, qb = _turn(COS, SIN, position, qa, qb, i[None, :], low[None, :], HALF)
        ka, kb = _turn(COS, SIN, position, ka, kb, i, low, HALF)
    rotated = ROTATED + (b * tl.num_programs(0) * G + h * G + g)[:, None] * D + i[None, :]
    tl.store(rotated, qa.to(ROTATED.dtype.element_ty), mask=q_low)
    tl.store(rotated + HALF, qb.to(ROTATED.dtype.element_ty), mask=q_high)
    k = KC + b * skc_b + h * skc_h + position * skc_t + i
    tl.store(k, ka.to(KC.dtype.element_ty), mask=low & (length > 0))
    tl.store(k + HALF, kb.to(KC.dtype.element_ty), mask=high & (length > 0))
    j = tl.arange(0, BDV)
    v = tl.load(V + b * sv_b + h * sv_h + j, mask=j < DV, other=0.0)
    tl.store(VC + b * svc_b + h * svc_h + position * svc_t + j, v.to(VC.dtype.element_ty), mask=(j < DV) & (length > 0))


@triton.jit
def _source(X, POSITION, COS, SIN, first, r, column, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Row first + r of x as phi takes it: rotation undone, its position in the block added."""
    mask = column < WIDTH
    token = (first + r).to(tl.int64)
    x = tl.load(X + token * stride + column, mask=mask, other=0.0).to(tl.float32)
    if COS is not None:
        HALF: tl.constexpr = WIDTH // 2
        partner = tl.where(column < HALF, column + HALF, column - HALF)
        y = tl.load(X + token * stride + partner, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(COS + token * HALF + column % HALF, mask=mask, other=1.0).to(tl.float32)
        sin = tl.load(SIN + token * HALF + column % HALF, mask=mask, other=0.0).to(tl.float32)
        x = (x * cos + tl.where(column < HALF, y, -y) * sin) / (cos * cos + sin * sin)  # cos, sin carry a magnitude
    if POSITION is not None:
        x += tl.load(POSITION + r * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _pool_newest(
    X, Y, SCORE, BIAS, POSITION, UNDO_COS, UNDO_SIN, LENGTHS, sx_b, sx_h, sx_t, sy_b, sy_h,
    L: tl.constexpr, LP: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The newest block's tokens, summed with softmax weights."""
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(LENGTHS + b)
    if length < L:
        return
    if (length - L) % STRIDE != 0:
        return
    if POSITION is not None:
        POSITION += h * L * WIDTH
    r, c = tl.arange(0, LP), tl.arange(0, BW)
    row = tl.minimum(r, L - 1)[:, None]  # rows past the block weigh nothing
    x = _source(X + b * sx_b + h * sx_h, POSITION, UNDO_COS, UNDO_SIN, length - L, row, c[None, :], sx_t, L, WIDTH)
    score = tl.load(SCORE + h * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + h * L + r, mask=r < L, other=0.0).to(tl.float32)
    logit = tl.where(r < L, tl.sum(x * score[None, :], 1) + bias, -float("inf"))
    weight = tl.exp(logit - tl.max(logit, 0))
    y = tl.sum(weight[:, None] * x, 0) / tl.sum(weight, 0)
    tl.store(Y + b * sy_b + h * sy_h + c, y, mask=c < WIDTH)


@triton.jit
def _compress_newest(
    X, Y, WEIGHT, BIAS, POSITION, UNDO_COS, UNDO_SIN, COS, SIN, LENGTHS, sx_b, sx_h, sx_t, sy_b, sy_h, sy_t,
    L: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, FROM_CACHE: tl.constexpr, TO_CACHE: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, HALF: tl.constexpr, BO: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Columns i and i + HALF of the result, for BO of them: the pairs that a rotation takes together."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(LENGTHS + b)
    if length < L:
        return
    if (length - L) % STRIDE != 0:
        return
    block = ((length - L) // STRIDE).to(tl.int64)
    first = block * 0
    if FROM_CACHE:
        first = block * STRIDE
    X += b * sx_b + h * sx_h
    if POSITION is not None:
        POSITION += h * ROWS * WIDTH
    i = tl.program_id(0) * BO + tl.arange(0, BO)
    low, high = tl.zeros((BO,), tl.float32), tl.zeros((BO,), tl.float32)
    if WEIGHT is None:
        for r in range(ROWS):
            low += _source(X, POSITION, UNDO_COS, UNDO_SIN, first, r, i, sx_t, ROWS, WIDTH)
            high += _source(X, POSITION, UNDO_COS, UNDO_SIN, first, r, i + HALF, sx_t, ROWS, WIDTH)
        low /= ROWS
        high /= ROWS
    else:
        WEIGHT += h * ROWS * WIDTH * OUT
        for r in range(ROWS):
            for n in range(0, WIDTH, BC):
                c = n + tl.arange(0, BC)
                x = _source(X, POSITION, UNDO_COS, UNDO_SIN, first, r, c, sx_t, ROWS, WIDTH)
                weight = WEIGHT + (r * WIDTH + c)[:, None] * OUT + i[None, :]
                inside = (c < WIDTH)[:, None]
                w = tl.load(weight, mask=inside & (i < HALF)[None, :], other=0.0).to(tl.float32)
                low += tl.sum(x[:, None] * w, 0)
                w = tl.load(weight + HALF, mask=inside & (i + HALF < OUT)[None, :], other=0.0).to(tl.float32)
                high += tl.sum(x[:, None] * w, 0)
    if BIAS is not None:
        low += tl.load(BIAS + h * OUT + i, mask=i < HALF, other=0.0).to(tl.float32)
        high += tl.load(BIAS + h * OUT + i + HALF, mask=i + HALF < OUT, other=0.0).to(tl.float32)
    if SILU:
        low, high = low * tl.sigmoid(low), high * tl.sigmoid(high)
    if COS is not None:
        low, high = _turn(COS, SIN, block * STRIDE, low, high, i, i < HALF, HALF)
    y = Y + b * sy_b + h * sy_h + i
    if TO_CACHE:
        y += block * sy_t
    tl.store(y, low.to(Y.dtype.element_ty), mask=i < HALF)
    tl.store(y + HALF, high.to(Y.dtype.element_ty), mask=i + HALF < OUT)
