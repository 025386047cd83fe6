"""The selected branch in Triton, forward and backward: exact causal softmax over the tokens of each query's blocks.

Forward and dq run one program per query and key head: its heads together against its n blocks, as in the paper (§3.4).
dk and dv run one program per block over the queries that chose it, listed by a sort of the choices, so that nothing is
added atomically; rows of a tile are (query, head) pairs there, and any group fills it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.tiles import load_rows, precision_of, split_width, store_rows, target_of


@triton.jit
def _heads(base, t, h, stride_t, stride_h, G: tl.constexpr, P: tl.constexpr):
    """Addresses of the P heads of group h at query t."""
    return base + t.to(tl.int64) * stride_t + (h * G + tl.arange(0, P)) * stride_h


@triton.jit
def _forward(
    q, k, v, chosen, o, lse, T, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, inner = tl.arange(0, P), tl.arange(0, N)
    at_q = _heads(q, t, h, q_t, q_h, G, P)
    q1 = load_rows(at_q, head < G, 0, D1, D)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(at_q, head < G, D1, D2, D)
    k += h * k_h
    v += h * v_h
    m = tl.full([P], float("-inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    acc = tl.zeros([P, BDV], tl.float32)
    chosen += (t.to(tl.int64) * tl.num_programs(1) + h) * COUNT
    for i in range(COUNT):
        j = tl.load(chosen + i)
        if j >= 0:
            for part in tl.static_range(0, BLOCK, N):
                key = j * BLOCK + part + inner
                seen = (part + inner < BLOCK) & (key <= offset + t)
                at_k, at_v = k + key.to(tl.int64) * k_s, v + key.to(tl.int64) * v_s
                s = tl.zeros([P, N], tl.float32)
                s = tl.dot(q1, load_rows(at_k, seen, 0, D1, D).T, s, input_precision=PRECISION)
                if D2 > 0:
                    s = tl.dot(q2, load_rows(at_k, seen, D1, D2, D).T, s, input_precision=PRECISION)
                s = tl.where(seen, s * scale, float("-inf"))
                top = tl.maximum(m, tl.max(s, 1))
                base = tl.where(top == float("-inf"), 0.0, top)
                p = tl.exp2(s - base[:, None])
                alpha = tl.exp2(m - base)
                total = total * alpha + tl.sum(p, 1)
                vt = load_rows(at_v, seen, 0, BDV, DV)
                acc = tl.dot(p.to(vt.dtype), vt, acc * alpha[:, None], input_precision=PRECISION)
                m = top
    safe = tl.where(total > 0, total, 1.0)
    store_rows(_heads(o, t, h, o_t, o_h, G, P), head < G, acc / safe[:, None], 0, BDV, DV)
    value = tl.where(total > 0, m + tl.log2(safe), float("-inf"))
    tl.store(lse + (h * T + t) * G + head, value, mask=head < G)


@triton.jit
def _backward_q(
    q, k, v, chosen, do, lse, delta, dq, T, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dq_t, dq_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, inner = tl.arange(0, P), tl.arange(0, N)
    at_q = _heads(q, t, h, q_t, q_h, G, P)
    q1 = load_rows(at_q, head < G, 0, D1, D)
    dq1 = tl.zeros([P, D1], tl.float32)
    q2, dq2 = q1, dq1
    if D2 > 0:
        q2 = load_rows(at_q, head < G, D1, D2, D)
        dq2 = tl.zeros([P, D2], tl.float32)
    g = load_rows(_heads(do, t, h, o_t, o_h, G, P), head < G, 0, BDV, DV)
    row = (h * T + t) * G + head
    lse_row = tl.load(lse + row, mask=head < G, other=0.0)
    delta_row = tl.load(delta + row, mask=head < G, other=0.0)
    k += h * k_h
    v += h * v_h
    chosen += (t.to(tl.int64) * tl.num_programs(1) + h) * COUNT
    for i in range(COUNT):
        j = tl.load(chosen + i)
        if j >= 0:
            for part in tl.static_range(0, BLOCK, N):
                key = j * BLOCK + part + inner
                seen = (part + inner < BLOCK) & (key <= offset + t)
                at_k, at_v = k + key.to(tl.int64) * k_s, v + key.to(tl.int64) * v_s
                k1 = load_rows(at_k, seen, 0, D1, D)
                s = tl.dot(q1, k1.T, tl.zeros([P, N], tl.float32), input_precision=PRECISION)
                if D2 > 0:
                    k2 = load_rows(at_k, seen, D1, D2, D)
                    s = tl.dot(q2, k2.T, s, input_precision=PRECISION)
                p = tl.where(seen, tl.exp2(s * scale - lse_row[:, None]), 0.0)
                vt = load_rows(at_v, seen, 0, BDV, DV)
                dp = tl.dot(g, vt.T, tl.zeros([P, N], tl.float32), input_precision=PRECISION)
                ds = (p * (dp - delta_row[:, None])).to(k1.dtype)
                dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
                if D2 > 0:
                    dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    scale *= 0.6931471805599453  # the scale holds log2 e
    at_q = _heads(dq, t, h, dq_t, dq_h, G, P)
    store_rows(at_q, head < G, dq1 * scale, 0, D1, D)
    if D2 > 0:
        store_rows(at_q, head < G, dq2 * scale, D1, D2, D)


@triton.jit
def _backward_kv(
    q, k, v, queries, starts, do, lse, delta, dk, dv_, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dk_s, dk_h, dv_s, dv_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk, dv of N keys of block program_id(0), from `queries`[starts[h, block]] up to the next start."""
    block, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inner = tl.program_id(2) * N + tl.arange(0, N)
    key = block * BLOCK + inner
    there = (inner < BLOCK) & (key < S)
    at = key.to(tl.int64)
    k1 = load_rows(k + h * k_h + at * k_s, there, 0, D1, D)
    dk1 = tl.zeros([N, D1], tl.float32)
    k2, dk2 = k1, dk1
    if D2 > 0:
        k2 = load_rows(k + h * k_h + at * k_s, there, D1, D2, D)
        dk2 = tl.zeros([N, D2], tl.float32)
    vt = load_rows(v + h * v_h + at * v_s, there, 0, BDV, DV)
    dv = tl.zeros([N, BDV], tl.float32)
    starts += h * (tl.num_programs(0) + 1) + block
    begin, end = tl.load(starts), tl.load(starts + 1)
    for first in range(begin * G, end * G, M):
        r = first + tl.arange(0, M)
        inside = r < end * G
        t = tl.load(queries + r // G, mask=inside, other=0).to(tl.int64)
        head = h * G + r % G
        at_q = q + t * q_t + head * q_h
        q1 = load_rows(at_q, inside, 0, D1, D)
        s = tl.dot(k1, q1.T, tl.zeros([N, M], tl.float32), input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(at_q, inside, D1, D2, D)
            s = tl.dot(k2, q2.T, s, input_precision=PRECISION)
        row = (h * T + t) * G + r % G
        lse_row = tl.load(lse + row, mask=inside, other=0.0)
        seen = inside[None, :] & there[:, None] & (key[:, None] <= (offset + t)[None, :])
        p = tl.where(seen, tl.exp2(s * scale - lse_row[None, :]), 0.0)
        g = load_rows(do + t * o_t + head * o_h, inside, 0, BDV, DV)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        dp = tl.dot(vt, g.T, tl.zeros([N, M], tl.float32), input_precision=PRECISION)
        delta_row = tl.load(delta + row, mask=inside, other=0.0)
        ds = (p * (dp - delta_row[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    scale *= 0.6931471805599453
    store_rows(dk + h * dk_h + at * dk_s, there, dk1 * scale, 0, D1, D)
    if D2 > 0:
        store_rows(dk + h * dk_h + at * dk_s, there, dk2 * scale, D1, D2, D)
    store_rows(dv_ + h * dv_h + at * dv_s, there, dv, 0, BDV, DV)


def choosers(chosen: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Who chose each block: queries (HKV * T * n,) int32 sorted by key head and block, and (HKV, blocks + 1) starts.

    chosen: (T, HKV, n), -1 = none.
    """
    T, HKV, n = chosen.shape
    head = torch.arange(HKV, device=chosen.device)[None, :, None] * (blocks + 1)
    bin = torch.where(chosen < 0, blocks, chosen).long() + head  # those that are none lie behind a head's last block
    order = bin.transpose(0, 1).flatten().argsort(stable=True)
    counts = torch.bincount(bin.flatten(), minlength=HKV * (blocks + 1))
    starts = (counts.cumsum(0) - counts).view(HKV, blocks + 1)
    return (order // n % T).to(torch.int32), starts


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, chosen, block, offset, scale):
        (T, HQ, D), (_, HKV, DV) = q.shape, v.shape
        G = HQ // HKV
        o = q.new_empty(T, HQ, DV)
        lse = torch.empty(HKV, T, G, device=q.device, dtype=torch.float32)
        shape = constants(q, k, v, block)
        key = G, D, DV, block, q.element_size(), target_of(q)
        strides = [x.stride(i) for x in (q, k, v, o) for i in (0, 1)]
        _forward[(T, HKV)](
            q, k, v, chosen, o, lse, T, offset, scale, *strides, **shape, COUNT=chosen.shape[2], **query_tiles(*key)
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, chosen, o, lse)
        ctx.call = offset, scale, shape, key
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, chosen, o, lse = ctx.saved_tensors
        offset, scale, shape, key = ctx.call
        (T, HQ, _), (S, HKV, _) = q.shape, v.shape
        G, do, NB = HQ // HKV, do.contiguous(), triton.cdiv(S, shape["BLOCK"])
        delta = (do.float() * o.float()).sum(-1).view(T, HKV, G).transpose(0, 1).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        strides = [x.stride(i) for x in (q, k, v, do) for i in (0, 1)]
        row = (do, lse, delta)
        _backward_q[(T, HKV)](
            q, k, v, chosen, *row, dq, T, offset, scale, *strides, *dq.stride()[:2], **shape, COUNT=chosen.shape[2],
            **query_tiles(*key),
        )  # fmt: skip
        tiles = block_tiles(*key)
        _backward_kv[(NB, HKV, triton.cdiv(shape["BLOCK"], tiles["N"]))](
            q, k, v, *choosers(chosen, NB), *row, dk, dv, T, S, offset, scale, *strides, *dk.stride()[:2],
            *dv.stride()[:2], **shape, **tiles,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None


def constants(q: Tensor, k: Tensor, v: Tensor, block: int) -> dict:
    """What all kernels of this file are compiled for."""
    (_, HQ, D), (_, HKV, DV) = q.shape, v.shape
    D1, D2 = split_width(D)
    shape = dict(G=HQ // HKV, D=D, DV=DV, D1=D1, D2=D2, BDV=max(16, triton.next_power_of_2(DV)))
    return shape | dict(BLOCK=block, PRECISION=precision_of(q))


def query_tiles(G: int, D: int, Dv: int, block: int, bytes: int, target: str) -> dict[str, int]:
    """Tiles and launch settings of the kernels with a program per query: its heads against N keys at a time. At D =
    192, Dv = 128 on sm_90 dq spills 736 bytes on one warp, 8 on two, none on four; forward 304, 0, 0.
    """
    keys = min(32 if bytes == 4 else 64, max(16, triton.next_power_of_2(block)))
    stages = 1 if target.startswith("hip") else 2
    return dict(P=max(16, triton.next_power_of_2(G)), N=keys, num_warps=4, num_stages=stages)


def block_tiles(G: int, D: int, Dv: int, block: int, bytes: int, target: str) -> dict[str, int]:
    """Tiles and launch settings of the kernel with a program per block: N of its keys, M rows at a time. On sm_80 M =
    64 spills nothing at D = Dv = 128 and 532 bytes at 192 and 128, M = 32 there 60; gfx942 none with 32 on four warps.
    """
    keys = min(32 if bytes == 4 else 64, max(16, triton.next_power_of_2(block)))
    if target.startswith("hip") or bytes == 4:
        return dict(M=32, N=keys, num_warps=4, num_stages=1)
    return dict(M=32 if max(D, Dv) > 128 else 64, N=keys, num_warps=8, num_stages=2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, *, offset: int = 0, scale: float | None = None
) -> Tensor:
    """o_slc (T, HQ, Dv). q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv); chosen: (T, HKV, n) blocks of `block` tokens,
    -1 = none. Differentiable in q, k and v.
    """
    scale = math.log2(math.e) * (q.shape[2] ** -0.5 if scale is None else scale)
    return _Selected.apply(q, k, v, chosen.contiguous(), block, offset, scale)
