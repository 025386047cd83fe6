"""One NSA decode step in Triton for a batch of sequences of different lengths, safe to capture in a CUDA graph.

A step is bound by the bytes it must read. Per sequence and key head that is T/d compressed keys and values, n * l'
tokens of the selected blocks and w of the window: at 64k tokens with the paper's settings 4096 + 1024 + 512 = 5632 of
65536, 11.6 times less than dense attention reads. Four launches, each with as many programs as there is room for:

1. `_stream_part`  compressed keys in splits: partial o_cmp and log-sum-exp, and every score in float32. The scores
   add G * 4 bytes to the 2 * (D + Dv) of each compressed key and value (10 % at G = 16, D = 192, Dv = 128), written
   once and read once, mostly from the L2 cache; computing them again would read D * 2 bytes.
2. `_candidates`   eq. 9 and 10 on chunks of selection blocks: the n best of each chunk.
3. `_gather_part`  ranks the candidates, then partial o_slc over splits of the chosen blocks, o_swa over the window's.
4. `_combine`      merges the partial results and applies the gates.

Lengths are read on the device and grids depend on capacities alone. Caches are (B, HKV, capacity, D) with any strides;
what they hold behind a sequence's length is never read.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.tiles import (
    dot,
    dot_pair,
    last_dense,
    load_pair,
    load_rows,
    load_tile,
    load_tile_pair,
    positive_scale,
    split_width,
    store_tile,
    target_of,
)
from nsa_kernels.variant import Variant


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    lengths: Tensor,
    variant: Variant,
    *,
    scale: float | None = None,
    q_cmp: Tensor | None = None,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.nsa_attention` for the last token of each of B sequences.

    q: (B, HQ, D); k, v: (B, HKV, capacity, D | Dv); k_cmp, v_cmp: (B, HKV, compressed capacity, D | Dv); gates:
    (B, HQ, 3); lengths: (B,) int32 on the device, tokens in the cache with the query's own, which is the last; 0 = no
    sequence there. Returns o (B, HQ, Dv), zero where the length is 0, and block_indices (B, HKV, n) int32, ascending.
    """
    _check(q, k, v, lengths, k_cmp=k_cmp, v_cmp=v_cmp)
    k_swa, v_swa = k if k_swa is None else k_swa, v if v_swa is None else v_swa
    q_cmp = q if q_cmp is None else q_cmp
    q, q_cmp, k, v, k_cmp, v_cmp, k_swa, v_swa, gates = map(
        last_dense, (q, q_cmp, k, v, k_cmp, v_cmp, k_swa, v_swa, gates)
    )
    B, HQ, D = q.shape
    _, HKV, capacity, Dv = v.shape
    scale, plan, shape = positive_scale(scale, D), _Plan.of(q, v, k_cmp.shape[2], variant), _shape(q, v)
    part = torch.empty(B, HQ, plan.parts, Dv, device=q.device, dtype=torch.float32)
    lse = torch.empty(B, HQ, plan.parts, device=q.device, dtype=torch.float32)
    scores = torch.empty(B, HQ, max(1, k_cmp.shape[2]), device=q.device, dtype=torch.float32)
    _stream_part[plan.compressed, HKV, B](
        q_cmp, k_cmp, v_cmp, part, lse, scores, lengths, *_strides(q_cmp, k_cmp, v_cmp), scores.shape[2], scale,
        plan.parts, L=variant.compress_block, STRIDE=variant.compress_stride, SCORES=True, **shape, **plan.options,
    )  # fmt: skip
    N, NP = variant.select_count, triton.next_power_of_2(variant.select_count)
    chunk, chunks = _chunks(variant.block_count(capacity), NP)
    choice = dict(
        SB=variant.select_block,
        N=N,
        NP=NP,
        # The streamed top-k keeps the best half of all earlier chunks and the best half of the query's own.
        HALF=N if variant.topk == "exact" else N // 2,
    )
    candidates = torch.empty(B, HKV, chunks, NP, device=q.device, dtype=torch.int64)
    weights = variant.importance_weights
    _candidates[chunks, HKV, B](
        scores, lse, candidates, lengths, scores.shape[2], plan.parts, plan.compressed,
        L=variant.compress_block, STRIDE=variant.compress_stride, INITIAL=variant.initial_blocks,
        LOCAL=variant.local_blocks, TOPK_CHUNK=variant.topk_chunk, FIRST=min(weights), OFFSETS=len(weights),
        WEIGHTS=tuple(weight for _, weight in sorted(weights.items())), CHUNK=chunk, G=shape["G"],
        SPLITS=triton.next_power_of_2(plan.compressed), num_warps=4, **choice,
    )  # fmt: skip
    block_indices = torch.empty(B, HKV, N, device=q.device, dtype=torch.int32)
    _gather_part[plan.selected + plan.window, HKV, B](
        q, k, v, k_swa, v_swa, part, lse, candidates, block_indices, lengths, *_strides(q, k, v, k_swa, v_swa), scale,
        plan.parts, plan.compressed, plan.selected, W=variant.window, TILES=plan.tiles, CANDIDATES=chunks * NP,
        CP=triton.next_power_of_2(chunks * NP), **choice, **shape, **plan.options,
    )  # fmt: skip
    o = torch.empty(B, HQ, Dv, device=q.device, dtype=q.dtype)
    _combine[HQ, B](
        part, lse, gates, o, *gates.stride()[:2], plan.parts, CMP=plan.compressed, SLC=plan.selected, SWA=plan.window,
        DV=Dv, BDV=shape["BDV"], num_warps=2,
    )  # fmt: skip
    return o, block_indices


def decode_dense(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None) -> Tensor:
    """Full attention of the last token of each of B sequences: the same split-K kernel over all tokens.

    q: (B, HQ, D); k, v: (B, HKV, capacity, D | Dv); lengths: (B,) int32 on the device. Returns (B, HQ, Dv).
    """
    _check(q, k, v, lengths)
    q, k, v = last_dense(q), last_dense(k), last_dense(v)
    (B, HQ, D), (_, HKV, capacity, Dv) = q.shape, v.shape
    splits, options = _splits(q, v, capacity), _options(q, v)
    part = torch.empty(B, HQ, splits, Dv, device=q.device, dtype=torch.float32)
    lse = torch.empty(B, HQ, splits, device=q.device, dtype=torch.float32)
    shape = _shape(q, v)
    _stream_part[splits, HKV, B](
        q, k, v, part, lse, lse, lengths, *_strides(q, k, v), 0, positive_scale(scale, D), splits,
        L=1, STRIDE=1, SCORES=False, **shape, **options,
    )  # fmt: skip
    o = torch.empty(B, HQ, Dv, device=q.device, dtype=q.dtype)
    _combine[HQ, B](
        part, lse, None, o, 0, 0, splits, CMP=splits, SLC=0, SWA=0, DV=Dv, BDV=shape["BDV"], num_warps=2
    )  # fmt: skip
    return o


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **compressed: Tensor) -> None:
    B, HQ, D = q.shape
    if k.ndim != 4 or k.shape[0] != B or k.shape[-1] != D or k.shape[:3] != v.shape[:3] or HQ % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if lengths.shape != (B,) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be ({B},) int32, got {tuple(lengths.shape)} {lengths.dtype}")
    for name, x in compressed.items():
        if x.shape[:2] != k.shape[:2]:
            raise ValueError(f"{name} {tuple(x.shape)} does not fit k {tuple(k.shape)}")


def _shape(q: Tensor, v: Tensor) -> dict[str, int]:
    D1, D2 = split_width(q.shape[-1])
    G, Dv = q.shape[1] // v.shape[1], v.shape[-1]
    # A product needs 16 rows: a smaller group is padded, which costs no bytes, and bytes are what a step waits for.
    GP = max(16, triton.next_power_of_2(G))
    return dict(G=G, GP=GP, D=q.shape[-1], DV=Dv, D1=D1, D2=D2, BDV=max(16, triton.next_power_of_2(Dv)))


def _strides(q: Tensor, *caches: Tensor) -> tuple[int, ...]:
    """Of q by sequence and head, of each cache by sequence, head and token."""
    return (*q.stride()[:2], *(stride for x in caches for stride in x.stride()[:3]))


def _options(q: Tensor, v: Tensor) -> dict[str, int]:
    """BN tokens a tile. At D = Dv = 64 in bfloat16 a tile of keys and values is 16 KB, and three stages let four
    programs share an SM: 128 KB in flight, five times what 4.8 TB/s and 700 ns of latency need from each of 132. Groups
    of 128 on four warps spill 15 KB a thread on sm_80.
    """
    target, wide = target_of(q), max(q.shape[-1], v.shape[-1]) > 64
    warps = 4 if q.shape[1] // v.shape[1] < 64 else 8
    if target == "cpu":
        return dict(BN=16)
    if target.startswith("hip") or q.element_size() == 4:  # 64 KB of shared memory; float32 doubles what a tile takes
        return dict(BN=32, num_warps=warps, num_stages=2 if not wide else 1)
    return dict(BN=64, num_warps=warps, num_stages=2 if wide else 3)


def _programs(q: Tensor) -> int:
    """How many programs keep the device busy at once: four per multiprocessor."""
    if q.device.type != "cuda":
        return 12
    return 4 * torch.cuda.get_device_properties(q.device).multi_processor_count


def _splits(q: Tensor, v: Tensor, rows: int) -> int:
    """Programs that share one head's rows; more than 128 would make merging them the longer part."""
    wanted = _programs(q) // (v.shape[0] * v.shape[1])
    return max(1, min(wanted, triton.cdiv(rows, _options(q, v)["BN"]), 128))


def _chunks(blocks: int, NP: int) -> tuple[int, int]:
    """Selection blocks per program of `_candidates`, and programs: all pairs of candidates are compared afterwards, so
    at most 128 of them remain, or NP.
    """
    chunk = max(256, triton.next_power_of_2(triton.cdiv(blocks, max(1, 128 // NP))))
    return chunk, max(1, triton.cdiv(blocks, chunk))


@dataclass(frozen=True)
class _Plan:
    """Programs per key head of a sequence, by branch."""

    compressed: int
    selected: int
    window: int
    tiles: int  # of BN tokens per program of the selected and window branches
    options: dict[str, int]

    @property
    def parts(self) -> int:
        return self.compressed + self.selected + self.window

    @classmethod
    def of(cls, q: Tensor, v: Tensor, rows: int, variant: Variant) -> "_Plan":
        options = _options(q, v)
        selected = triton.cdiv(variant.select_count * variant.select_block, options["BN"])
        window = triton.cdiv(variant.window, options["BN"])
        heads = v.shape[0] * v.shape[1]
        tiles = max(1, min(8, heads * (selected + window) // _programs(q)))
        parts = (triton.cdiv(selected, tiles), triton.cdiv(window, tiles))
        return cls(_splits(q, v, rows), *parts, tiles, options)


@triton.jit
def _attend_rows(
    q1, q2, k1, k2, v, visible, scale2, acc, l, m, D2: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """BN keys into the running softmax of a group's heads. Returns its state and the scores in base 2."""
    s = tl.where(visible[None, :], dot_pair(q1, q2, k1, k2, GP, BN, D2) * scale2, float("-inf"))
    higher = tl.maximum(m, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: p = exp2(-inf) = 0, not NaN
    p = tl.math.exp2(s - base[:, None])
    shrink = tl.math.exp2(m - base)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, l * shrink + tl.sum(p, 1), higher, s


@triton.jit
def _store_part(
    PART, LSE, acc, l, m, row, part, parts, G: tl.constexpr, GP: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr
):  # fmt: skip
    """One split's o and base-2 log-sum-exp, rows row .. row+G-1 of (B * HQ, parts)."""
    total = tl.where(l > 0, l, 1.0)
    lse = tl.where(l > 0, m + tl.math.log2(total), float("-inf"))
    store_tile(PART + (row * parts + part) * DV, 0, parts * DV, G, acc / total[:, None], GP, 0, BDV, DV)
    g = tl.arange(0, GP)
    tl.store(LSE + (row + g) * parts + part, lse, mask=g < G)


@triton.jit
def _compressed_count(length, L: tl.constexpr, STRIDE: tl.constexpr):
    """`Variant.compressed_count`; a quotient of negative numbers would round up here."""
    return tl.where(length < L, 0, (length - L) // STRIDE + 1)


@triton.jit(do_not_specialize=["width", "parts"])
def _stream_part(
    Q, K, V, PART, LSE, SCORE, LENGTHS, sq_b, sq_h, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, width, scale, parts,
    L: tl.constexpr, STRIDE: tl.constexpr, SCORES: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One split of all rows that a sequence's last token sees: compressed blocks, or tokens where L = STRIDE = 1."""
    split, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    count = _compressed_count(tl.load(LENGTHS + b), L, STRIDE)
    # Splits share the rows there are, not those there is room for: none idles in a short sequence of a long cache.
    share = tl.cdiv(tl.cdiv(count, BN), tl.num_programs(0)) * BN
    first = split * share
    last = min(count, first + share)
    row = b * tl.num_programs(1) * G + h * G
    Q += b * sq_b + h * G * sq_h
    K += b * sk_b + h * sk_h
    V += b * sv_b + h * sv_h
    q1, q2 = load_tile_pair(Q, 0, sq_h, G, GP, D1, D2, D)
    m = tl.full((GP,), float("-inf"), tl.float32)
    l = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, BDV), tl.float32)
    scale2 = scale * 1.4426950408889634  # log2(e)
    g = tl.arange(0, GP)
    for n in range(first, last, BN):
        k1, k2 = load_tile_pair(K, n, sk_t, last, BN, D1, D2, D)
        v = load_tile(V, n, sv_t, last, BN, 0, BDV, DV, True)
        seen = n + tl.arange(0, BN)
        acc, l, m, s = _attend_rows(q1, q2, k1, k2, v, seen < last, scale2, acc, l, m, D2, GP, BN)
        if SCORES:
            mask = (g < G)[:, None] & (seen < last)[None, :]
            tl.store(SCORE + (row + g)[:, None] * width + seen[None, :], s, mask=mask)
    _store_part(PART, LSE, acc, l, m, row, split, parts, G, GP, DV, BDV)


@triton.jit(do_not_specialize=["width", "parts", "splits"])
def _candidates(
    SCORE, LSE, CANDIDATE, LENGTHS, width, parts, splits,
    L: tl.constexpr, STRIDE: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, TOPK_CHUNK: tl.constexpr,
    FIRST: tl.constexpr, OFFSETS: tl.constexpr, WEIGHTS: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr,
    SPLITS: tl.constexpr, SB: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The best of CHUNK selection blocks, as 64-bit keys: the importance's bits, which order as the floats do since
    none is negative, above 2**31-1 minus the block's index, so that of equals the first wins. -1 = none.
    """
    chunk, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(LENGTHS + b)
    count = _compressed_count(length, L, STRIDE)
    current = tl.where(length > 0, (length - 1) // SB, -1)
    block = chunk * CHUNK + tl.arange(0, CHUNK)
    importance = tl.zeros((CHUNK,), tl.float32)
    split = tl.arange(0, SPLITS)
    row = (b * tl.num_programs(1) + h) * G
    for g in range(G):
        lse = tl.load(LSE + (row + g) * parts + split, mask=split < splits, other=float("-inf"))
        top = tl.where(count > 0, tl.max(lse, 0), 0.0)
        lse = top + tl.math.log2(tl.where(count > 0, tl.sum(tl.math.exp2(lse - top), 0), 1.0))
        for i in tl.static_range(OFFSETS):
            c = block * (SB // STRIDE) + (FIRST + i)
            s = tl.load(SCORE + (row + g) * width + c, mask=(c >= 0) & (c < count), other=float("-inf"))
            importance += WEIGHTS[i] * tl.math.exp2(s - lse)
    forced = (block < INITIAL) | (block > current - LOCAL)
    importance = tl.where(forced, float("inf"), importance)
    key = (importance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)
    key = tl.where(block <= current, key, -1)
    slot = tl.arange(0, NP)
    best = tl.full((NP,), -1, tl.int64)
    if chunk * CHUNK <= current:
        for r in range(N):
            pool = key
            if HALF < N:
                own = (block // TOPK_CHUNK) == (current // TOPK_CHUNK)
                pool = tl.where(own == (r >= HALF), key, -1)
            highest = tl.max(pool, 0)
            best = tl.where(slot == r, highest, best)
            key = tl.where(key == highest, -1, key)
    row = (b * tl.num_programs(1) + h) * tl.num_programs(0) + chunk
    tl.store(CANDIDATE + row * NP + slot, best)


@triton.jit(do_not_specialize=["parts", "before", "selected"])
def _gather_part(
    Q, K, V, KW, VW, PART, LSE, CANDIDATE, INDEX, LENGTHS, sq_b, sq_h, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
    skw_b, skw_h, skw_t, svw_b, svw_h, svw_t, scale, parts, before, selected,
    W: tl.constexpr, TILES: tl.constexpr, CANDIDATES: tl.constexpr, CP: tl.constexpr, SB: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, HALF: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """TILES * BN tokens of the chosen blocks (programs before `selected`) or of the window (the others)."""
    split, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(LENGTHS + b)
    row = b * tl.num_programs(1) * G + h * G
    Q += b * sq_b + h * G * sq_h
    q1, q2 = load_tile_pair(Q, 0, sq_h, G, GP, D1, D2, D)
    m = tl.full((GP,), float("-inf"), tl.float32)
    l = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, BDV), tl.float32)
    scale2 = scale * 1.4426950408889634
    if split < selected:
        candidate = tl.arange(0, CP)
        heads = b * tl.num_programs(1) + h
        key = tl.load(CANDIDATE + heads * CANDIDATES + candidate, mask=candidate < CANDIDATES, other=-1)
        # All pairs are compared: 128 * 128 at most, where picking the best N times would wait N times for all warps.
        side = (candidate % NP) // HALF
        better = (key[:, None] > key[None, :]) & (side[:, None] == side[None, :])
        rank = tl.sum(better.to(tl.int32), 0)
        chosen = (key >= 0) & (rank < HALF)
        rank = tl.where(chosen, rank + side * HALF, -1)
        index = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
        if split == 0:
            order = tl.sum((chosen[:, None] & (index[:, None] < index[None, :])).to(tl.int32), 0)
            tl.store(INDEX + heads * N + order, index, mask=chosen)
            slot = tl.arange(0, NP)
            none = (slot >= tl.sum(chosen.to(tl.int32), 0)) & (slot < N)
            tl.store(INDEX + heads * N + slot, tl.full((NP,), -1, tl.int32), mask=none)
        K += b * sk_b + h * sk_h
        V += b * sv_b + h * sv_h
        for i in range(TILES):
            slot = (split * TILES + i) * BN + tl.arange(0, BN)
            mine = rank[:, None] == (slot // SB)[None, :]  # one candidate at most has a slot's rank
            block = tl.sum(tl.where(mine, index[:, None] + 1, 0), 0) - 1
            token = block * SB + slot % SB
            ok = (block >= 0) & (token < length)
            k1, k2 = load_pair(K + token.to(tl.int64) * sk_t, ok, D1, D2, D)
            v = load_rows(V + token.to(tl.int64) * sv_t, ok, 0, BDV, DV)
            acc, l, m, _ = _attend_rows(q1, q2, k1, k2, v, ok, scale2, acc, l, m, D2, GP, BN)
    else:
        KW += b * skw_b + h * skw_h
        VW += b * svw_b + h * svw_h
        for i in range(TILES):
            slot = ((split - selected) * TILES + i) * BN + tl.arange(0, BN)
            token = length - W + slot
            ok = (slot < W) & (token >= 0)
            k1, k2 = load_pair(KW + token.to(tl.int64) * skw_t, ok, D1, D2, D)
            v = load_rows(VW + token.to(tl.int64) * svw_t, ok, 0, BDV, DV)
            acc, l, m, _ = _attend_rows(q1, q2, k1, k2, v, ok, scale2, acc, l, m, D2, GP, BN)
    _store_part(PART, LSE, acc, l, m, row, before + split, parts, G, GP, DV, BDV)


@triton.jit
def _merge(PART, LSE, COUNT, DV: tl.constexpr, BDV: tl.constexpr):
    """o of a branch from COUNT splits' partial results; zero where none saw a key."""
    column = tl.arange(0, BDV)
    acc = tl.zeros((BDV,), tl.float32)
    total = 0.0
    top = float("-inf")
    for i in range(0, COUNT, 16):
        split = i + tl.arange(0, 16)
        lse = tl.load(LSE + split, mask=split < COUNT, other=float("-inf"))
        higher = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.math.exp2(lse - base), tl.math.exp2(top - base)
        mask = (split < COUNT)[:, None] & (column < DV)[None, :]
        o = tl.load(PART + split[:, None] * DV + column[None, :], mask=mask, other=0.0)
        acc = acc * shrink + tl.sum(o * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = higher
    return acc / tl.where(total > 0, total, 1.0)


@triton.jit(do_not_specialize=["parts", "CMP"])
def _combine(
    PART, LSE, GATES, O, sg_b, sg_h, parts, CMP, SLC: tl.constexpr, SWA: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr,
):  # fmt: skip
    """Eq. 5 for one head of one sequence; without gates the first branch alone."""
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = b * tl.num_programs(0) + h
    PART += row * parts * DV
    LSE += row * parts
    o = _merge(PART, LSE, CMP, DV, BDV)
    if GATES is not None:
        gate = GATES + b * sg_b + h * sg_h
        o *= tl.load(gate).to(tl.float32)
        o += tl.load(gate + 1).to(tl.float32) * _merge(PART + CMP * DV, LSE + CMP, SLC, DV, BDV)
        if SWA > 0:
            swa = _merge(PART + (CMP + SLC) * DV, LSE + (CMP + SLC), SWA, DV, BDV)
            o += tl.load(gate + 2).to(tl.float32) * swa
    column = tl.arange(0, BDV)
    tl.store(O + row * DV + column, o.to(O.dtype.element_ty), mask=column < DV)
