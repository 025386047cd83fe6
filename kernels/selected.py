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

from nsa_kernels.ranged import _precision
from nsa_kernels.tiles import target_of


@triton.jit
def _query(base, t, h, stride_t, stride_h, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, PD: tl.constexpr):
    """Addresses of the heads of one query, (P, PD), and which of them are real."""
    head, d = tl.arange(0, P), tl.arange(0, PD)
    at = base + t.to(tl.int64) * stride_t + (h * G + head).to(tl.int64)[:, None] * stride_h + d
    return at, (head < G)[:, None] & (d < D)


@triton.jit
def _forward(
    q, k, v, chosen, o, lse, T, S, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    N: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0), tl.program_id(1)
    at, real = _query(q, t, h, q_t, q_h, G, P, D, PD)
    x = tl.load(at, mask=real, other=0.0)
    d, dv = tl.arange(0, PD), tl.arange(0, PV)
    m = tl.full([P], float("-inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    acc = tl.zeros([P, PV], tl.float32)
    row = (t.to(tl.int64) * tl.num_programs(1) + h) * COUNT
    for i in range(COUNT):
        j = tl.load(chosen + row + i)
        if j >= 0:
            for part in tl.static_range(0, BLOCK, N):
                inner = part + tl.arange(0, N)
                key = j * BLOCK + inner
                seen = (inner < BLOCK) & (key <= offset + t)
                to = key.to(tl.int64)
                kt = tl.load(
                    k + h.to(tl.int64) * k_h + to[None, :] * k_s + d[:, None], mask=seen & (d[:, None] < D), other=0.0
                )
                s = tl.where(seen, tl.dot(x, kt, input_precision=PRECISION) * scale, float("-inf"))
                top = tl.maximum(m, tl.max(s, 1))
                base = tl.where(top == float("-inf"), 0.0, top)
                p = tl.exp2(s - base[:, None])
                alpha = tl.exp2(m - base)
                total = total * alpha + tl.sum(p, 1)
                vt = tl.load(
                    v + h.to(tl.int64) * v_h + to[:, None] * v_s + dv, mask=seen[:, None] & (dv < DV), other=0.0
                )
                acc = acc * alpha[:, None] + tl.dot(p.to(vt.dtype), vt, input_precision=PRECISION)
                m = top
    safe = tl.where(total > 0, total, 1.0)
    out, real_v = _query(o, t, h, o_t, o_h, G, P, DV, PV)
    tl.store(out, (acc / safe[:, None]).to(o.dtype.element_ty), mask=real_v)
    head = tl.arange(0, P)
    value = tl.where(total > 0, m + tl.log2(safe), float("-inf"))
    tl.store(lse + (h.to(tl.int64) * T + t) * G + head, value, mask=head < G)


@triton.jit
def _backward_q(
    q, k, v, chosen, do, lse, delta, dq, T, S, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    dq_t, dq_h,
    G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    N: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0), tl.program_id(1)
    at, real = _query(q, t, h, q_t, q_h, G, P, D, PD)
    x = tl.load(at, mask=real, other=0.0)
    at, real_v = _query(do, t, h, o_t, o_h, G, P, DV, PV)
    g = tl.load(at, mask=real_v, other=0.0)
    d, dv, head = tl.arange(0, PD), tl.arange(0, PV), tl.arange(0, P)
    at_row = (h.to(tl.int64) * T + t) * G + head
    lse_row = tl.load(lse + at_row, mask=head < G, other=0.0)
    delta_row = tl.load(delta + at_row, mask=head < G, other=0.0)
    acc = tl.zeros([P, PD], tl.float32)
    row = (t.to(tl.int64) * tl.num_programs(1) + h) * COUNT
    for i in range(COUNT):
        j = tl.load(chosen + row + i)
        if j >= 0:
            for part in tl.static_range(0, BLOCK, N):
                inner = part + tl.arange(0, N)
                key = j * BLOCK + inner
                seen = (inner < BLOCK) & (key <= offset + t)
                to = key.to(tl.int64)
                kt = tl.load(k + h.to(tl.int64) * k_h + to[:, None] * k_s + d, mask=seen[:, None] & (d < D), other=0.0)
                vt = tl.load(
                    v + h.to(tl.int64) * v_h + to[:, None] * v_s + dv, mask=seen[:, None] & (dv < DV), other=0.0
                )
                s = tl.dot(x, tl.trans(kt), input_precision=PRECISION) * scale
                p = tl.where(seen, tl.exp2(s - lse_row[:, None]), 0.0)
                ds = p * (tl.dot(g, tl.trans(vt), input_precision=PRECISION) - delta_row[:, None])
                acc += tl.dot(ds.to(kt.dtype), kt, input_precision=PRECISION)
    acc *= scale * 0.6931471805599453  # the scale holds log2 e
    at, real = _query(dq, t, h, dq_t, dq_h, G, P, D, PD)
    tl.store(at, acc.to(dq.dtype.element_ty), mask=real)


@triton.jit
def _backward_kv(
    q, k, v, queries, starts, do, lse, delta, dk, dv_, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dk_s, dk_h, dv_s, dv_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PD: tl.constexpr, PV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of N keys of block program_id(0), from `queries`[starts[h, block]] up to the next start."""
    block, h = tl.program_id(0), tl.program_id(1)
    inner = tl.program_id(2) * N + tl.arange(0, N)
    key = block * BLOCK + inner
    there = (inner < BLOCK) & (key < S)
    to = key.to(tl.int64)
    d, dv = tl.arange(0, PD), tl.arange(0, PV)
    kt = tl.load(k + h.to(tl.int64) * k_h + to[:, None] * k_s + d, mask=there[:, None] & (d < D), other=0.0)
    vt = tl.load(v + h.to(tl.int64) * v_h + to[:, None] * v_s + dv, mask=there[:, None] & (dv < DV), other=0.0)
    dk_acc = tl.zeros([N, PD], tl.float32)
    dv_acc = tl.zeros([N, PV], tl.float32)
    begin = tl.load(starts + h * (tl.num_programs(0) + 1) + block)
    end = tl.load(starts + h * (tl.num_programs(0) + 1) + block + 1)
    for first in range(begin * G, end * G, M):
        r = first + tl.arange(0, M).to(tl.int64)
        inside = r < end * G
        t = tl.load(queries + r // G, mask=inside, other=0).to(tl.int64)
        head = (h * G + r % G).to(tl.int64)
        x = tl.load(q + t[:, None] * q_t + head[:, None] * q_h + d, mask=inside[:, None] & (d < D), other=0.0)
        g = tl.load(do + t[:, None] * o_t + head[:, None] * o_h + dv, mask=inside[:, None] & (dv < DV), other=0.0)
        at_row = (h.to(tl.int64) * T + t) * G + r % G
        lse_row = tl.load(lse + at_row, mask=inside, other=0.0)
        delta_row = tl.load(delta + at_row, mask=inside, other=0.0)
        s = tl.dot(x, tl.trans(kt), input_precision=PRECISION) * scale
        seen = inside[:, None] & there & (key <= (offset + t)[:, None])
        p = tl.where(seen, tl.exp2(s - lse_row[:, None]), 0.0)
        dv_acc += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        ds = p * (tl.dot(g, tl.trans(vt), input_precision=PRECISION) - delta_row[:, None])
        dk_acc += tl.dot(tl.trans(ds.to(x.dtype)), x, input_precision=PRECISION)
    dk_acc *= scale * 0.6931471805599453
    at = dk + h.to(tl.int64) * dk_h + to[:, None] * dk_s + d
    tl.store(at, dk_acc.to(dk.dtype.element_ty), mask=there[:, None] & (d < D))
    at = dv_ + h.to(tl.int64) * dv_h + to[:, None] * dv_s + dv
    tl.store(at, dv_acc.to(dv_.dtype.element_ty), mask=there[:, None] & (dv < DV))


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
        (T, HQ, D), (S, HKV, DV) = q.shape, v.shape
        G = HQ // HKV
        o = q.new_empty(T, HQ, DV)
        lse = torch.empty(HKV, T, G, device=q.device, dtype=torch.float32)
        shape, rows, keys = settings(G, D, DV, block, target_of(q))
        shape["PRECISION"], rows["COUNT"] = _precision(q), chosen.shape[2]
        strides = [x.stride(i) for x in (q, k, v, o) for i in (0, 1)]
        _forward[(T, HKV)](q, k, v, chosen, o, lse, T, S, offset, scale, *strides, **shape, **rows)
        ctx.save_for_backward(q, k, v, chosen, o, lse)
        ctx.call = offset, scale, shape, rows, keys
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, chosen, o, lse = ctx.saved_tensors
        offset, scale, shape, rows, keys = ctx.call
        (T, HQ, _), (S, HKV, _) = q.shape, v.shape
        G, do, NB = HQ // HKV, do.contiguous(), triton.cdiv(S, shape["BLOCK"])
        delta = (do.float() * o.float()).sum(-1).view(T, HKV, G).transpose(0, 1).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        strides = [x.stride(i) for x in (q, k, v, do) for i in (0, 1)]
        row = (do, lse, delta)
        _backward_q[(T, HKV)](
            q, k, v, chosen, *row, dq, T, S, offset, scale, *strides, *dq.stride()[:2], **shape, **rows
        )  # fmt: skip
        _backward_kv[(NB, HKV, triton.cdiv(shape["BLOCK"], keys["N"]))](
            q, k, v, *choosers(chosen, NB), *row, dk, dv, T, S, offset, scale, *strides, *dk.stride()[:2],
            *dv.stride()[:2], **shape, **keys,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None


def settings(G: int, D: int, DV: int, block: int, target: str) -> tuple[dict, dict, dict]:
    """Constants and launch settings: of all three kernels, of those per query, of the one per block.

    A query's heads fill one tile of 16 rows, which one warp multiplies; a tile of keys is a whole block where that is a
    power of two from 16 to 64.
    """
    shape = dict(G=G, D=D, DV=DV, BLOCK=block, PRECISION="tf32")
    shape |= dict(PD=max(16, triton.next_power_of_2(D)), PV=max(16, triton.next_power_of_2(DV)))
    keys = max(16, min(64, triton.next_power_of_2(block)))
    rows = dict(P=max(16, triton.next_power_of_2(G)), N=keys, num_warps=1 if G <= 16 else 4)
    hip = target.startswith("hip")
    stages = dict(num_stages=1 if hip else 2)
    return shape, rows | stages, dict(M=32 if hip else 64, N=keys, num_warps=4) | stages


def attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, *, offset: int = 0, scale: float | None = None
) -> Tensor:
    """o_slc (T, HQ, Dv). q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv); chosen: (T, HKV, n) blocks of `block` tokens,
    -1 = none. Differentiable in q, k and v.
    """
    scale = math.log2(math.e) * (q.shape[2] ** -0.5 if scale is None else scale)
    return _Selected.apply(q, k, v, chosen.contiguous(), block, offset, scale)
