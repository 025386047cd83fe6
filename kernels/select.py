"""Which blocks a query reads (eq. 9 to 12), in Triton: scores are made again from q, k_cmp and lse and never stored.

Held as one row a query, importances of 128k tokens would take 128k x 2k x 4 bytes = 1 GB per key head. Here a tile of
queries keeps its best n so far in registers, as integers that hold a score's bits above the block's number:
non-negative floats order as their bits do, and one sort moves both.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import Packing
from nsa_kernels.ranged import group_rows, key_range
from nsa_kernels.tiles import dot_pair, load_pair, split_width, target_of
from nsa_kernels.variant import Variant


@triton.jit
def _merge(best, new, N: tl.constexpr):
    """The N largest of two rows, descending. best is so already; new has at least N."""
    top = tl.topk(new, N)
    return tl.sort(tl.maximum(best, tl.flip(top, 1)), descending=True)  # bitonic: the larger of best[i], top[N-1-i]


@triton.jit
def _blocks(best, KEEP: tl.constexpr, T: tl.constexpr, N: tl.constexpr):
    """Numbers of the first KEEP entries that are there, 2^31 - 1 for the others."""
    number = (2147483647 - (best & 2147483647)).to(tl.int32)
    kept = (tl.arange(0, N)[None, :] < KEEP) & (best >= 0)
    return tl.where(kept, number, 2147483647)


@triton.jit(do_not_specialize=["T", "NC", "offset"])
def _select(
    q, k, lse, chosen, TOKEN, KEY, FIRST_BLOCK, BLOCK_KEY, T, NC, offset, scale, q_t, q_h, k_s, k_h,
    G: tl.constexpr, PG: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, L: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, WEIGHTS: tl.constexpr, OFFSETS: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, COUNT: tl.constexpr, KEEP: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """j runs over the blocks of the whole batch; current and block number those of a query's own sequence."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.arange(0, BT * PG)  # rows: every query has PG heads, G of them real, so that a sum over heads is one axis
    rt, head = tl.program_id(0) * BT + r // PG, r % PG
    real = (rt < T) & (head < G)
    row = rt * G + head
    lo, hi = key_range(rt, T, NC, offset, TOKEN, KEY, L, STRIDE, 0)
    hi = tl.where(real, hi, 0)
    q1, q2 = load_pair(group_rows(q, row, h, q_t, q_h, G), real, D1, D2, D)
    k += h * k_h
    lse_row = tl.load(lse + h * T * G + row, mask=real & (hi > lo), other=0.0)
    current, begin = (offset + t) // BLOCK, t * 0
    if TOKEN is not None:
        current = (t - tl.load(TOKEN + t, mask=t < T, other=0)) // BLOCK
        begin = tl.load(FIRST_BLOCK + t, mask=t < T, other=0)
    best = tl.full([BT, N], -1, tl.int64)
    own = tl.full([BT, N], -1, tl.int64)
    last = tl.max(tl.where(t < T, begin + current, 0))
    for start in range(tl.min(tl.where(t < T, begin, last)), last + 1, BJ):
        j = start + tl.arange(0, BJ)
        key = j * (BLOCK // STRIDE)
        if TOKEN is not None:
            key = tl.load(BLOCK_KEY + j, mask=j <= last, other=0)
        score = tl.zeros([BT, BJ], tl.float32)
        for w in tl.static_range(OFFSETS):
            c = key + FIRST + w
            there = (c >= 0) & (c < NC)
            k1, k2 = load_pair(k + c.to(tl.int64) * k_s, there, D1, D2, D)
            s = dot_pair(q1, q2, k1, k2, BT * PG, BJ, D2)
            p = tl.where((c >= lo[:, None]) & (c < hi[:, None]), tl.exp2(s * scale - lse_row[:, None]), 0.0)
            score += WEIGHTS[w] * tl.sum(tl.reshape(p, (BT, PG, BJ)), 1)
        block = j[None, :] - begin[:, None]
        forced = (block < INITIAL) | (block > current[:, None] - LOCAL)
        score = tl.where(forced, float("inf"), score)
        bits = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (2147483647 - block).to(tl.int64)
        bits = tl.where((block >= 0) & (block <= current[:, None]), bits, -1)
        if CHUNK:
            mine = block // CHUNK == (current // CHUNK)[:, None]
            own = _merge(own, tl.where(mine, bits, -1), N)
            bits = tl.where(mine, -1, bits)
        best = _merge(best, bits, N)
    found = _blocks(best, KEEP, BT, N)
    to = chosen + (t.to(tl.int64)[:, None] * tl.num_programs(1) + h) * COUNT
    if CHUNK:
        both = tl.reshape(tl.join(found, _blocks(own, KEEP, BT, N)), (BT, 2 * N))
        found = tl.sort(both)
        i = tl.arange(0, 2 * N)
    else:
        found = tl.sort(found)
        i = tl.arange(0, N)
    found = tl.where(found == 2147483647, -1, found)
    tl.store(to + i, found, mask=(t < T)[:, None] & (i < COUNT))


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    variant: Variant,
    *,
    offset: int = 0,
    scale: float | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Forced blocks and the most important others per query, ascending, -1 where fewer exist: (T, HKV, n) int32.

    q: (T, HQ, D); k_cmp: (NC, HKV, D); lse: (HKV, T * G) in log2, of the compressed branch (`ranged.attention`).
    packing: of a packed batch, offset 0; blocks are numbered within each sequence.
    """
    (T, HQ, D), (NC, HKV, _) = q.shape, k_cmp.shape
    G, (D1, D2) = HQ // HKV, split_width(D)
    shape = dict(G=G, D=D, D1=D1, D2=D2) | _rule(variant)
    tile = tiles(G, shape["N"], q.element_size(), target_of(q))
    chosen = torch.empty(T, HKV, variant.select_count, device=q.device, dtype=torch.int32)
    scale = math.log2(math.e) * (D**-0.5 if scale is None else scale)
    grid = (triton.cdiv(T, tile["BT"]), HKV)
    strides = (*q.stride()[:2], *k_cmp.stride()[:2])
    tables = [None] * 4
    if packing is not None:
        tables = [packing.first_token, packing.compressed.key, packing.first_block, packing.block_key]
    _select[grid](q, k_cmp, lse, chosen, *tables, T, NC, offset, scale, *strides, **shape, **tile)
    return chosen


def _rule(v: Variant) -> dict:
    """The variant as the kernel's constants."""
    keep, chunk = (v.select_count // 2, v.topk_chunk) if v.topk == "streamed" else (v.select_count, 0)
    first, last = min(v.importance_weights), max(v.importance_weights)
    weights = tuple(float(v.importance_weights.get(i, 0)) for i in range(first, last + 1))
    blocks = dict(L=v.compress_block, STRIDE=v.compress_stride, BLOCK=v.select_block)
    forced = dict(INITIAL=v.initial_blocks, LOCAL=v.local_blocks, COUNT=v.select_count)
    best = dict(KEEP=keep, N=max(2, triton.next_power_of_2(keep)), CHUNK=chunk)
    return blocks | forced | best | dict(FIRST=first, WEIGHTS=weights, OFFSETS=len(weights))


def tiles(G: int, N: int, bytes: int, target: str) -> dict[str, int]:
    """BT queries whose heads, padded to PG each, fill about 64 rows, against BJ selection blocks, at least the N kept.
    At D = 192 in bfloat16 a stage of keys is 12 KB and the rows 24 KB: 61 KB in all of gfx942's 64.
    """
    PG = triton.next_power_of_2(G)
    rows, blocks = (16, 16) if target == "cpu" else (64, 16 if bytes == 4 else 32)
    stages = 1 if target.startswith("hip") else 2
    return dict(PG=PG, BT=max(16, rows, PG) // PG, BJ=max(16, blocks, N), num_warps=4, num_stages=stages)
