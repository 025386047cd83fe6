"""The selected branch in Triton, forward and backward: exact causal softmax over the tokens of each query's blocks.

A query's keys are shared by the G heads of its group alone, so what decides is how often keys are read. Per query and
key head n * l' = 1024 tokens of keys and values are 512 KB at D = Dv = 128 in bfloat16:

    by query   (G >= 16) a program per query, its heads against its blocks, as in the paper (§3.4): 32 KB a head at
               G = 16, read from the L2 cache, but 512 KB at G = 1 and 13 of 16 rows of a product empty at G = 3.
    by block   (G < 16) a program per block, the queries that chose it in tiles of full rows: a block is read once, and
               a head costs n rows of q in, and n of o out and in again: 12 KB at any G.

Who chose a block is listed by a sort of the choices. Partial results (o of a block, its log-sum-exp; dk and dv of a
piece of a block's list) are written and summed by a second kernel: nothing is added atomically, results repeat exactly.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.delta import delta
from nsa_kernels.packing import Packing
from nsa_kernels.tiles import (
    dot,
    dot_pair,
    last_dense,
    load_pair,
    load_rows,
    split_width,
    store_pair,
    store_rows,
    target_of,
)

PARTIAL_BYTES = 1 << 30  # of partial results at a time: 4096 queries of 64 heads of 128 in bfloat16


@triton.jit
def _heads(base, t, h, stride_t, stride_h, G: tl.constexpr, P: tl.constexpr):
    """Addresses of the P heads of group h at query t."""
    return base + t.to(tl.int64) * stride_t + (h * G + tl.arange(0, P)) * stride_h


@triton.jit
def _blocks_of(chosen, TOKEN, t, h, COUNT: tl.constexpr):
    """Where the blocks of query t begin to be listed, how many there are (none, -1, stand last), and the first token of
    its sequence.
    """
    chosen += (t.to(tl.int64) * tl.num_programs(1) + h) * COUNT
    slot = tl.arange(0, triton.next_power_of_2(COUNT))
    count = tl.sum((tl.load(chosen + slot, mask=slot < COUNT, other=-1) >= 0).to(tl.int32), 0)
    first = 0
    if TOKEN is not None:
        first = tl.load(TOKEN + t)
    return chosen, count, first


@triton.jit
def _keys(chosen, first, i, last, BLOCK: tl.constexpr, N: tl.constexpr):
    """Keys i * N .. i * N + N - 1 of the chosen blocks, and which of them are there and not after `last`."""
    parts: tl.constexpr = (BLOCK + N - 1) // N
    within = i % parts * N + tl.arange(0, N)
    key = first + tl.load(chosen + i // parts) * BLOCK + within
    return key.to(tl.int64), (within < BLOCK) & (key <= last)


@triton.jit(do_not_specialize=["T", "offset"])
def _forward(
    q, k, v, chosen, o, lse, TOKEN, T, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, P)
    q1, q2 = load_pair(_heads(q, t, h, q_t, q_h, G, P), head < G, D1, D2, D)
    k += h * k_h
    v += h * v_h
    m = tl.full([P], float("-inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    acc = tl.zeros([P, BDV], tl.float32)
    chosen, count, first = _blocks_of(chosen, TOKEN, t, h, COUNT)
    for i in range(count * ((BLOCK + N - 1) // N)):  # without a branch inside, so that loads run ahead of products
        key, seen = _keys(chosen, first, i, offset + t, BLOCK, N)
        k1, k2 = load_pair(k + key * k_s, seen, D1, D2, D)
        s = tl.where(seen, dot_pair(q1, q2, k1, k2, P, N, D2) * scale, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        total = total * alpha + tl.sum(p, 1)
        vt = load_rows(v + key * v_s, seen, 0, BDV, DV)
        acc = dot(p.to(vt.dtype), vt, acc * alpha[:, None])
        m = top
    safe = tl.where(total > 0, total, 1.0)
    store_rows(_heads(o, t, h, o_t, o_h, G, P), head < G, acc / safe[:, None], 0, BDV, DV)
    value = tl.where(total > 0, m + tl.log2(safe), float("-inf"))
    tl.store(lse + (h * T + t) * G + head, value, mask=head < G)


@triton.jit(do_not_specialize=["T", "offset"])
def _backward_q(
    q, k, v, chosen, do, lse, delta, dq, TOKEN, T, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h, dq_t, dq_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, P)
    q1, q2 = load_pair(_heads(q, t, h, q_t, q_h, G, P), head < G, D1, D2, D)
    dq1 = tl.zeros([P, D1], tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros([P, D2], tl.float32)
    g = load_rows(_heads(do, t, h, o_t, o_h, G, P), head < G, 0, BDV, DV)
    row = (h * T + t) * G + head
    lse_row = tl.load(lse + row, mask=head < G, other=0.0)
    delta_row = tl.load(delta + row, mask=head < G, other=0.0)
    k += h * k_h
    v += h * v_h
    chosen, count, first = _blocks_of(chosen, TOKEN, t, h, COUNT)
    for i in range(count * ((BLOCK + N - 1) // N)):
        key, seen = _keys(chosen, first, i, offset + t, BLOCK, N)
        k1, k2 = load_pair(k + key * k_s, seen, D1, D2, D)
        s = dot_pair(q1, q2, k1, k2, P, N, D2)
        p = tl.where(seen, tl.exp2(s * scale - lse_row[:, None]), 0.0)
        vt = load_rows(v + key * v_s, seen, 0, BDV, DV)
        dp = dot(g, vt.T, tl.zeros([P, N], tl.float32))
        ds = (p * (dp - delta_row[:, None])).to(k1.dtype)
        dq1 = dot(ds, k1, dq1)
        if D2 > 0:
            dq2 = dot(ds, k2, dq2)
    scale *= 0.6931471805599453  # the scale holds log2 e
    store_pair(_heads(dq, t, h, dq_t, dq_h, G, P), head < G, dq1 * scale, dq2 * scale, D1, D2, D)


@triton.jit
def _piece(pieces, BLOCK_TOKEN, BLOCK_END, S, h, G: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr):
    """Of this program's piece of a block's list, first and last row (choice, head); of its keys, number and which of
    them there are.
    """
    at = pieces + (h * tl.num_programs(0) + tl.program_id(0)) * 3
    first, end = _span(tl.load(at).to(tl.int32), BLOCK_TOKEN, BLOCK_END, S, BLOCK)
    inner = tl.program_id(2) * N + tl.arange(0, N)
    return tl.load(at + 1) * G, tl.load(at + 2) * G, first + inner, (inner < BLOCK) & (first + inner < end)


@triton.jit
def _span(block, BLOCK_TOKEN, BLOCK_END, S, BLOCK: tl.constexpr):
    """First token of a block, and where its sequence ends."""
    first, end = block * BLOCK, S
    if BLOCK_TOKEN is not None:
        first, end = tl.load(BLOCK_TOKEN + block), tl.load(BLOCK_END + block)
    return first, end


@triton.jit
def _rows(entries, first, end, h, G: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr):
    """Query, head and slot among the query's blocks of rows first .. first+M-1, and which of them there are."""
    r = first + tl.arange(0, M)
    inside = r < end
    entry = tl.load(entries + r // G, mask=inside, other=0).to(tl.int64)
    return entry // COUNT, h * G + r % G, entry % COUNT, inside


@triton.jit(do_not_specialize=["S", "offset"])
def _block_forward(
    q, k, v, entries, pieces, part, lse, BLOCK_TOKEN, BLOCK_END, S, offset, scale, q_t, q_h, k_s, k_h, v_s, v_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """o and log-sum-exp over N keys of a block for each row that chose it: (T, HQ, COUNT * parts of a block, DV)."""
    h = tl.program_id(1).to(tl.int64)
    begin, end, key, there = _piece(pieces, BLOCK_TOKEN, BLOCK_END, S, h, G, BLOCK, N)
    if begin < end:
        at = key.to(tl.int64)
        k1, k2 = load_pair(k + h * k_h + at * k_s, there, D1, D2, D)
        vt = load_rows(v + h * v_h + at * v_s, there, 0, BDV, DV)
        for first in range(begin, end, M):
            t, head, slot, inside = _rows(entries, first, end, h, G, COUNT, M)
            q1, q2 = load_pair(q + t * q_t + head * q_h, inside, D1, D2, D)
            seen = inside[:, None] & there[None, :] & (key[None, :] <= (offset + t)[:, None])
            s = tl.where(seen, dot_pair(q1, q2, k1, k2, M, N, D2) * scale, float("-inf"))
            m = tl.max(s, 1)
            p = tl.exp2(s - tl.where(m == float("-inf"), 0.0, m)[:, None])
            total = tl.sum(p, 1)
            acc = dot(p.to(vt.dtype), vt, tl.zeros([M, BDV], tl.float32))
            safe = tl.where(total > 0, total, 1.0)
            to = ((t * tl.num_programs(1) * G + head) * COUNT + slot) * tl.num_programs(2) + tl.program_id(2)
            store_rows(part + to * DV, inside, acc / safe[:, None], 0, BDV, DV)
            tl.store(lse + to, tl.where(total > 0, m + tl.log2(safe), float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _merge(part, part_lse, o, lse, T, HQ, G: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, PARTS: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """o and lse of R rows (query, head) from the partial ones; what no block wrote has lse = -inf and is not read."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < T * HQ
    m = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, BDV], tl.float32)
    for i in range(PARTS):
        x = tl.load(part_lse + row * PARTS + i, mask=there, other=float("-inf"))
        seen = x > float("-inf")
        top = tl.maximum(m, x)
        base = tl.where(top == float("-inf"), 0.0, top)
        weight, shrink = tl.exp2(x - base), tl.exp2(m - base)
        add = load_rows(part + (row * PARTS + i) * DV, seen, 0, BDV, DV).to(tl.float32)
        acc = acc * shrink[:, None] + add * weight[:, None]
        total = total * shrink + weight
        m = top
    safe = tl.where(total > 0, total, 1.0)
    store_rows(o + row * DV, there, acc / safe[:, None], 0, BDV, DV)
    t, head = row // HQ, row % HQ
    to = (head // G * T + t) * G + head % G
    tl.store(lse + to, tl.where(total > 0, m + tl.log2(safe), float("-inf")), mask=there)


@triton.jit(do_not_specialize=["T", "S", "offset"])
def _block_backward_q(
    q, k, v, entries, pieces, do, lse, delta, part, BLOCK_TOKEN, BLOCK_END, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq from N keys of a block for each row that chose it: (T, HQ, COUNT * parts of a block, D)."""
    h = tl.program_id(1).to(tl.int64)
    begin, end, key, there = _piece(pieces, BLOCK_TOKEN, BLOCK_END, S, h, G, BLOCK, N)
    if begin < end:
        at = key.to(tl.int64)
        k1, k2 = load_pair(k + h * k_h + at * k_s, there, D1, D2, D)
        vt = load_rows(v + h * v_h + at * v_s, there, 0, BDV, DV)
        for first in range(begin, end, M):
            t, head, slot, inside = _rows(entries, first, end, h, G, COUNT, M)
            q1, q2 = load_pair(q + t * q_t + head * q_h, inside, D1, D2, D)
            row = (h * T + t) * G + head % G
            lse_row = tl.load(lse + row, mask=inside, other=0.0)
            delta_row = tl.load(delta + row, mask=inside, other=0.0)
            seen = inside[:, None] & there[None, :] & (key[None, :] <= (offset + t)[:, None])
            s = dot_pair(q1, q2, k1, k2, M, N, D2)
            p = tl.where(seen, tl.exp2(s * scale - lse_row[:, None]), 0.0)
            g = load_rows(do + t * o_t + head * o_h, inside, 0, BDV, DV)
            dp = dot(g, vt.T, tl.zeros([M, N], tl.float32))
            ds = (p * (dp - delta_row[:, None]) * (scale * 0.6931471805599453)).to(k1.dtype)
            to = ((t * tl.num_programs(1) * G + head) * COUNT + slot) * tl.num_programs(2) + tl.program_id(2)
            dq1 = dot(ds, k1, tl.zeros([M, D1], tl.float32))
            dq2 = dq1
            if D2 > 0:
                dq2 = dot(ds, k2, tl.zeros([M, D2], tl.float32))
            store_pair(part + to * D, inside, dq1, dq2, D1, D2, D)


@triton.jit(do_not_specialize=["T", "S", "offset"])
def _block_backward_kv(
    q, k, v, entries, pieces, do, lse, delta, dk, dv_, BLOCK_TOKEN, BLOCK_END, T, S, offset, scale,
    q_t, q_h, k_s, k_h, v_s, v_h, o_t, o_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk, dv of N keys of a block from one piece of its list: (HKV, pieces, BLOCK, D | DV)."""
    h = tl.program_id(1).to(tl.int64)
    begin, end, key, there = _piece(pieces, BLOCK_TOKEN, BLOCK_END, S, h, G, BLOCK, N)
    if begin < end:
        at = key.to(tl.int64)
        k1, k2 = load_pair(k + h * k_h + at * k_s, there, D1, D2, D)
        vt = load_rows(v + h * v_h + at * v_s, there, 0, BDV, DV)
        dk1 = tl.zeros([N, D1], tl.float32)
        dk2 = dk1
        if D2 > 0:
            dk2 = tl.zeros([N, D2], tl.float32)
        dv = tl.zeros([N, BDV], tl.float32)
        for first in range(begin, end, M):
            t, head, _, inside = _rows(entries, first, end, h, G, COUNT, M)
            q1, q2 = load_pair(q + t * q_t + head * q_h, inside, D1, D2, D)
            row = (h * T + t) * G + head % G
            lse_row = tl.load(lse + row, mask=inside, other=0.0)
            seen = inside[None, :] & there[:, None] & (key[:, None] <= (offset + t)[None, :])
            s = dot_pair(k1, k2, q1, q2, N, M, D2)
            p = tl.where(seen, tl.exp2(s * scale - lse_row[None, :]), 0.0)
            g = load_rows(do + t * o_t + head * o_h, inside, 0, BDV, DV)
            dv = dot(p.to(g.dtype), g, dv)
            dp = dot(vt, g.T, tl.zeros([N, M], tl.float32))
            delta_row = tl.load(delta + row, mask=inside, other=0.0)
            ds = (p * (dp - delta_row[None, :])).to(q1.dtype)
            dk1 = dot(ds, q1, dk1)
            if D2 > 0:
                dk2 = dot(ds, q2, dk2)
        scale *= 0.6931471805599453
        inner = tl.program_id(2) * N + tl.arange(0, N)
        to = (h * tl.num_programs(0) + tl.program_id(0)) * BLOCK + inner
        store_pair(dk + to * D, there, dk1 * scale, dk2 * scale, D1, D2, D)
        store_rows(dv_ + to * DV, there, dv, 0, BDV, DV)


@triton.jit(do_not_specialize=["S", "pieces"])
def _sum_pieces(
    part, starts, out, BLOCK_TOKEN, BLOCK_END, S, pieces, out_s, out_h, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    BW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out (S, HKV, WIDTH) = the sum of the partial results of each block's pieces starts[h, block] .. next - 1."""
    block, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = _span(block, BLOCK_TOKEN, BLOCK_END, S, BLOCK)
    inner = tl.program_id(2) * N + tl.arange(0, N)
    key = first + inner
    there = (inner < BLOCK) & (key < end)
    starts += h * (tl.num_programs(0) + 1) + block
    acc = tl.zeros([N, BW], tl.float32)
    for piece in range(tl.load(starts), tl.load(starts + 1)):
        acc += load_rows(part + ((h * pieces + piece) * BLOCK + inner) * WIDTH, there, 0, BW, WIDTH)
    store_rows(out + h * out_h + key.to(tl.int64) * out_s, there, acc, 0, BW, WIDTH)


@dataclass(frozen=True)
class Choosers:
    """Who chose each block. A list longer than twice the average, as the first block's is, which every query must read,
    is cut: at most two pieces a block on average, of about equal length.

    entries: (HKV * T * n,) int32, query * n + slot, sorted by key head and block; pieces: (HKV, 2 * blocks, 3) int64,
    block, first and last + 1 of entries, nothing in those left over; starts: (HKV, blocks + 1) int64, first piece of
    each block.
    """

    entries: Tensor
    pieces: Tensor
    starts: Tensor

    @classmethod
    def of(cls, chosen: Tensor, blocks: int) -> "Choosers":
        """chosen: (T, HKV, n) int32, -1 = none."""
        (T, HKV, n), device = chosen.shape, chosen.device
        bins = torch.arange(
            HKV * (blocks + 1) + 1, device=device, dtype=torch.int32
        )  # a head's last: those that are none
        bin = torch.where(chosen < 0, blocks, chosen) + bins[: -1 : blocks + 1, None]
        bin, order = bin.transpose(0, 1).flatten().sort(stable=True)
        entries = (order % (T * n)).to(torch.int32)
        bounds = torch.searchsorted(bin, bins)  # bincount would wait for the device, to know its own length
        first = bounds[:-1].view(HKV, -1)[:, :blocks]
        counts = bounds.diff().view(HKV, -1)[:, :blocks]
        size = max(64, -(-T * n // blocks))  # choices of a piece
        stops = (-(-counts // size)).cumsum(1)
        starts = torch.cat([torch.zeros_like(stops[:, :1]), stops], 1)
        piece = torch.arange(2 * blocks, device=device).expand(HKV, -1).contiguous()
        block = torch.searchsorted(stops, piece, right=True)
        real, block = block < blocks, block.clamp(max=blocks - 1)
        begin = first.gather(1, block) + (piece - starts.gather(1, block)) * size
        end = torch.minimum(begin + size, (first + counts).gather(1, block))
        return cls(entries, torch.stack([block, begin.where(real, 0), end.where(real, 0)], -1), starts)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, chosen, block, offset, scale, packing):
        call = _Call(q, k, v, chosen, block, offset, scale, packing)
        (T, HQ, _), (_, HKV, DV) = q.shape, v.shape
        o, lse = q.new_empty(T, HQ, DV), torch.empty(HKV, T, HQ // HKV, device=q.device, dtype=torch.float32)
        (call.forward_by_block if call.shape["G"] < 16 else call.forward_by_query)(o, lse)
        ctx.save_for_backward(q, k, v, chosen, o, lse)
        ctx.call = block, offset, scale, packing
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, chosen, o, lse = ctx.saved_tensors
        call, do = _Call(q, k, v, chosen, *ctx.call), last_dense(do)
        sums = delta(o, do, call.shape["G"])
        by = call.query_gradient_by_block if call.shape["G"] < 16 else call.query_gradient_by_query
        return by(do, lse, sums), *call.key_gradients(do, lse, sums), None, None, None, None, None


class _Call:
    """One call's tensors and constants, and the launches on them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, offset: int, scale: float,
        packing: Packing | None = None,
    ) -> None:  # fmt: skip
        (_, HQ, D), (S, HKV, DV) = q.shape, v.shape
        D1, D2 = split_width(D)
        self.q, self.k, self.v, self.chosen = q, k, v, chosen
        self.offset, self.scale, self.blocks = offset, scale, triton.cdiv(S, block)
        self.first_token, self.numbered, self.spans = None, chosen, (None, None)
        if packing is not None:
            self.first_token, self.spans, self.blocks = packing.first_token, packing.spans, packing.blocks
            self.numbered = torch.where(chosen < 0, -1, chosen + packing.first_block[:, None, None])
        self.shape = dict(G=HQ // HKV, D=D, DV=DV, D1=D1, D2=D2, BDV=max(16, triton.next_power_of_2(DV)))
        self.shape |= dict(BLOCK=block, COUNT=chosen.shape[2])
        self.tiles = self.shape["G"], D, DV, block, q.element_size(), target_of(q)

    def forward_by_query(self, o: Tensor, lse: Tensor) -> None:
        grid = o.shape[0], self.k.shape[1]
        _forward[grid](
            self.q, self.k, self.v, self.chosen, o, lse, self.first_token, o.shape[0], self.offset, self.scale,
            *_strides(self.q, self.k, self.v, o), **self.shape, **query_tiles(*self.tiles),
        )  # fmt: skip

    def query_gradient_by_query(self, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        dq = torch.empty(self.q.shape, device=self.q.device, dtype=self.q.dtype)
        _backward_q[(do.shape[0], self.k.shape[1])](
            self.q, self.k, self.v, self.chosen, do, lse, delta, dq, self.first_token, do.shape[0], self.offset,
            self.scale, *_strides(self.q, self.k, self.v, do, dq), **self.shape, **query_tiles(*self.tiles),
        )  # fmt: skip
        return dq

    def forward_by_block(self, o: Tensor, lse: Tensor) -> None:
        (_, HQ, DV), tiles = o.shape, block_tiles(*self.tiles)
        for rows, grid, choosers, parts in self._chunks(tiles, DV * o.element_size()):
            count, q = rows.stop - rows.start, self.q[rows]
            part = o.new_empty(count, HQ, parts, DV)
            part_lse = torch.full((count, HQ, parts), -torch.inf, device=o.device, dtype=torch.float32)
            _block_forward[grid](
                q, self.k, self.v, choosers.entries, choosers.pieces, part, part_lse, *self.spans, self.k.shape[0],
                self.offset + rows.start, self.scale, *_strides(q, self.k, self.v), **self.shape, **tiles,
            )  # fmt: skip
            merged = torch.empty(lse.shape[0], count, lse.shape[2], device=o.device, dtype=torch.float32)
            _merge[(triton.cdiv(count * HQ, 16),)](
                part, part_lse, o[rows], merged, count, HQ, G=self.shape["G"], DV=DV, BDV=self.shape["BDV"],
                PARTS=parts, R=16, num_warps=4,
            )  # fmt: skip
            lse[:, rows] = merged

    def query_gradient_by_block(self, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        dq, tiles = torch.empty(self.q.shape, device=self.q.device, dtype=self.q.dtype), block_tiles(*self.tiles)
        _, HQ, D = dq.shape
        for rows, grid, choosers, parts in self._chunks(tiles, D * 4):
            count, q, g = rows.stop - rows.start, self.q[rows], do[rows]
            part = torch.zeros(count, HQ, parts, D, device=dq.device, dtype=torch.float32)  # they cancel: no rounding
            _block_backward_q[grid](
                q, self.k, self.v, choosers.entries, choosers.pieces, g, lse[:, rows].contiguous(),
                delta[:, rows].contiguous(), part, *self.spans, count, self.k.shape[0], self.offset + rows.start,
                self.scale, *_strides(q, self.k, self.v, g), **self.shape, **tiles,
            )  # fmt: skip
            torch.sum(part, 2, out=dq[rows]) if dq.dtype == torch.float32 else dq[rows].copy_(part.sum(2))
        return dq

    def key_gradients(self, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        k, v, tiles, choosers = self.k, self.v, block_tiles(*self.tiles), Choosers.of(self.numbered, self.blocks)
        (S, HKV, D), DV, block = k.shape, v.shape[2], self.shape["BLOCK"]
        pieces, parts = choosers.pieces.shape[1], triton.cdiv(block, tiles["N"])
        dk_part = torch.empty(HKV, pieces, block, D, device=k.device, dtype=torch.float32)
        dv_part = torch.empty(HKV, pieces, block, DV, device=k.device, dtype=torch.float32)
        _block_backward_kv[(pieces, HKV, parts)](
            self.q, k, v, choosers.entries, choosers.pieces, do, lse, delta, dk_part, dv_part, *self.spans,
            do.shape[0], S, self.offset, self.scale, *_strides(self.q, k, v, do), **self.shape, **tiles,
        )  # fmt: skip
        dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (k, v))
        for part, out in ((dk_part, dk), (dv_part, dv)):
            width = out.shape[2]
            _sum_pieces[(self.blocks, HKV, parts)](
                part, choosers.starts, out, *self.spans, S, pieces, *_strides(out), BLOCK=block, WIDTH=width,
                BW=max(16, triton.next_power_of_2(width)), N=tiles["N"], num_warps=4,
            )  # fmt: skip
        return dk, dv

    def _chunks(self, tiles: dict[str, int], row_bytes: int):
        """As many queries at a time as PARTIAL_BYTES hold partial rows of: their slice, grid, choosers and partial
        results a row.
        """
        (T, HQ, _), HKV = self.q.shape, self.k.shape[1]
        parts = triton.cdiv(self.shape["BLOCK"], tiles["N"])
        count = self.shape["COUNT"] * parts
        step = max(1, PARTIAL_BYTES // (HQ * count * row_bytes))
        for start in range(0, T, step):
            rows = slice(start, min(T, start + step))
            choosers = Choosers.of(self.numbered[rows], self.blocks)
            yield rows, (choosers.pieces.shape[1], HKV, parts), choosers, count


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Row and head stride of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def query_tiles(G: int, D: int, Dv: int, block: int, bytes: int, target: str) -> dict[str, int]:
    """Tiles and launch settings of the kernels by query: a group's heads against N keys at a time. Two of three stages
    hold keys, one the number of their block: 72 KB at D = Dv = 128, three programs a multiprocessor on sm_90. At D =
    192, Dv = 128 dq spills 736 bytes on one warp, 8 on two, none on four; in groups of 128 23 KB on four, on sm_80.
    """
    keys = min(32 if bytes == 4 else 64, max(16, triton.next_power_of_2(block)))
    stages = 1 if target.startswith("hip") else 3
    rows = max(16, triton.next_power_of_2(G))
    return dict(P=rows, N=keys, num_warps=4 if rows < 64 else 8, num_stages=stages)


def block_tiles(G: int, D: int, Dv: int, block: int, bytes: int, target: str) -> dict[str, int]:
    """Tiles and launch settings of the kernels by block: N of its keys, M rows at a time. On sm_80 dk and dv with M =
    64 spill nothing at D = Dv = 128 and 532 bytes at 192 and 128, with M = 32 there 60; gfx942 none with 32.
    """
    keys = min(32 if bytes == 4 else 64, max(16, triton.next_power_of_2(block)))
    if target.startswith("hip") or bytes == 4:
        return dict(M=32, N=keys, num_warps=4, num_stages=1)
    return dict(M=32 if max(D, Dv) > 128 else 64, N=keys, num_warps=8, num_stages=2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block: int,
    *,
    offset: int = 0,
    scale: float | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """o_slc (T, HQ, Dv). q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv); chosen: (T, HKV, n) blocks of `block` tokens,
    numbered within each sequence, -1 = none and last. packing: of a packed batch, offset 0. Differentiable in q, k
    and v.
    """
    scale = math.log2(math.e) * (q.shape[2] ** -0.5 if scale is None else scale)
    return _Selected.apply(q, k, v, chosen.contiguous(), block, offset, scale, packing)
