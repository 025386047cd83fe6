"""Dense causal attention in Triton, forward and backward: what NSA is measured against.

The algorithm is FlashAttention-2's (arXiv 2307.08691): one program a tile of queries and head, keys streamed through
on-chip memory under a running softmax; backward recomputes the probabilities from q, k and the log-sum-exp. Scores are
kept in base 2 (`exp2` is the hardware's instruction), with scale * log2(e) folded into the same multiply-add.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.delta import delta
from nsa_kernels.tiles import (
    check_heads,
    dot,
    dot_pair,
    last_dense,
    load_tile,
    load_tile_pair,
    positive_scale,
    split_width,
    store_tile,
    target_of,
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offset: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Causal full attention. q: (T, HQ, D); k: (S, HKV, D); v: (S, HKV, Dv). Returns (T, HQ, Dv).

    One sequence: queries stand at offset .. offset+T-1, S >= offset+T, later keys are ignored. Packed sequences:
    cu_seqlens (B+1,) int32 on the device, S = T, offset 0; max_seqlen spares a read of cu_seqlens by the host.
    """
    check_heads(q, k, v)
    if cu_seqlens is None and k.shape[0] < offset + q.shape[0]:
        raise ValueError(f"{k.shape[0]} keys for queries that end at {offset + q.shape[0]}")
    if cu_seqlens is not None and (offset or k.shape[0] != q.shape[0]):
        raise ValueError("packed sequences have no offset, and as many keys as queries")
    if cu_seqlens is not None and max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())
    return _Flash.apply(q, k, v, offset, positive_scale(scale, q.shape[-1]), cu_seqlens, max_seqlen)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, offset, scale, cu_seqlens, max_seqlen):
        q, k, v = last_dense(q), last_dense(k), last_dense(v)
        T, HQ, _ = q.shape
        o = q.new_empty(T, HQ, v.shape[-1])
        lse = torch.empty(HQ, T, device=q.device, dtype=torch.float32)
        launch = _Launch(q, k, v, offset, scale, cu_seqlens, max_seqlen)
        tile, options = forward_tiles(*launch.key)
        grid = (triton.cdiv(launch.queries, tile["BM"]), HQ, launch.sequences)
        _forward[grid](
            q, k, v, o, lse, cu_seqlens, *launch.strides(q, k, v, o), *launch.lengths, **launch.shape, **tile, **options
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.launch = launch
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        launch, do = ctx.launch, last_dense(do)
        HQ = q.shape[1]
        dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
        common = (q, k, v, do, lse, delta(o, do, 1))
        tile, options = query_gradient_tiles(*launch.key)
        grid = (triton.cdiv(launch.queries, tile["BM"]), HQ, launch.sequences)
        _query_gradient[grid](
            *common, dq, launch.cu_seqlens, *launch.strides(q, k, v, do, dq), *launch.lengths,
            **launch.shape, **tile, **options,
        )  # fmt: skip
        tile, options = key_gradient_tiles(*launch.key)
        grid = (triton.cdiv(launch.keys, tile["BN"]), k.shape[1], launch.sequences)
        _key_gradient[grid](
            *common, dk, dv, launch.cu_seqlens, *launch.strides(q, k, v, do, dk, dv), *launch.lengths,
            **launch.shape, **tile, **options,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None


class _Launch:
    """The arguments that the three kernels share."""

    def __init__(self, q, k, v, offset, scale, cu_seqlens, max_seqlen) -> None:
        (T, HQ, D), (S, HKV, Dv) = q.shape, v.shape
        varlen = cu_seqlens is not None
        self.cu_seqlens = cu_seqlens
        self.sequences = cu_seqlens.shape[0] - 1 if varlen else 1
        self.queries, self.keys = (max_seqlen, max_seqlen) if varlen else (T, S)
        self.lengths = T, S, offset, scale, T
        D1, D2 = split_width(D)
        self.shape = dict(G=HQ // HKV, D=D, DV=Dv, D1=D1, D2=D2, BDV=max(16, triton.next_power_of_2(Dv)), VARLEN=varlen)
        self.key = D, Dv, q.element_size(), target_of(q)

    @staticmethod
    def strides(*tensors: Tensor) -> tuple[int, ...]:
        """Row and head stride of each."""
        return tuple(stride for x in tensors for stride in x.stride()[:2])


def forward_tiles(D: int, Dv: int, bytes: int, target: str) -> tuple[dict, dict]:
    """Tile sizes and launch options. Shared memory: BM * D for q and stages * BN * (D + Dv), times `bytes`; with
    (128, 64) at D = Dv = 128 in bfloat16 and three stages 128 KB, within every NVIDIA target's limit. gfx942 has 64 KB
    and keeps q in registers.
    """
    if target == "cpu":  # the interpreter: several tiles of each kind in few tokens
        return dict(BM=32, BN=16), {}
    wide = max(D, Dv) > 128
    if bytes == 4:  # no tensor cores: operands live in registers, and larger tiles spill
        return dict(BM=32, BN=32), dict(num_warps=8, num_stages=1)
    if target.startswith("hip"):
        return dict(BM=128, BN=32 if wide else 64), dict(num_warps=4, num_stages=1)
    if wide:
        return dict(BM=128, BN=64), dict(num_warps=8, num_stages=2)
    return dict(BM=128, BN=64), dict(num_warps=4 if max(D, Dv) <= 64 else 8, num_stages=3)


def query_gradient_tiles(D: int, Dv: int, bytes: int, target: str) -> tuple[dict, dict]:
    """As `forward_tiles`; do is held besides q. In float32 tiles of 32 x 32 spill 708 bytes a thread at D = 192, Dv =
    128 on sm_80, of 16 x 32 508, and they compile in half the time.
    """
    if target == "cpu":
        return dict(BM=32, BN=16), {}
    wide = max(D, Dv) > 128
    if bytes == 4:
        return dict(BM=16, BN=32), dict(num_warps=8, num_stages=1)
    if target.startswith("hip"):
        return dict(BM=64, BN=32), dict(num_warps=4, num_stages=1)
    if wide:
        return dict(BM=64, BN=64), dict(num_warps=8, num_stages=2)
    return dict(BM=128, BN=64), dict(num_warps=8, num_stages=2)


def key_gradient_tiles(D: int, Dv: int, bytes: int, target: str) -> tuple[dict, dict]:
    """As `forward_tiles`; k and v are held, dk and dv accumulate in registers, q and do stream. At D = 192, Dv = 128
    tiles of 32 x 64 spill 9 KB a thread on sm_80, which multiplies from registers; of 16 x 64 nothing.
    """
    if target == "cpu":
        return dict(BM=16, BN=32), {}
    wide = max(D, Dv) > 128
    if bytes == 4:
        return dict(BM=16, BN=32), dict(num_warps=8, num_stages=1)
    if target.startswith("hip"):
        return dict(BM=32, BN=64), dict(num_warps=4, num_stages=1)
    if wide:
        return dict(BM=16 if target.startswith("cuda:8") else 32, BN=64), dict(num_warps=8, num_stages=2)
    return dict(BM=64, BN=128), dict(num_warps=8, num_stages=2)


@triton.jit
def _sequence(CU, T, S, offset, VARLEN: tl.constexpr):
    """First row, queries, keys and keys that any query sees of this program's sequence. What a cache holds beyond
    those may be anything, NaN included, and is not read.
    """
    first = 0
    if VARLEN:
        first = tl.load(CU + tl.program_id(2))
        T = tl.load(CU + tl.program_id(2) + 1) - first
        S = T
    return tl.cast(first, tl.int64), T, S, min(S, offset + T)


@triton.jit
def _attend_tile(
    q1, q2, K, V, n, limit, sk_t, sv_t, S, scale2, acc, l, m,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Keys n .. n+BN-1 into the running softmax; row i sees keys up to limit[i]."""
    k1, k2 = load_tile_pair(K, n, sk_t, S, BN, D1, D2, D, MASK)
    s = dot_pair(q1, q2, k1, k2, BM, BN, D2)
    if MASK:
        s = tl.where((n + tl.arange(0, BN))[None, :] <= limit[:, None], s, float("-inf"))
    # Key 0 is in the first tile and visible to every row, so m is finite from there on.
    higher = tl.maximum(m, tl.max(s, 1) * scale2)
    p = tl.math.exp2(s * scale2 - higher[:, None])
    shrink = tl.math.exp2(m - higher)
    v = load_tile(V, n, sv_t, S, BN, 0, BDV, DV, MASK)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, l * shrink + tl.sum(p, 1), higher


@triton.jit(do_not_specialize=["T", "S", "offset", "total"])
def _forward(
    Q, K, V, O, LSE, CU, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, so_t, so_h, T, S, offset, scale, total,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    VARLEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, T, _, S = _sequence(CU, T, S, offset, VARLEN)
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows first: short ones fill the gaps at the end
    if m0 >= T:
        return
    h = tl.program_id(1).to(tl.int64)
    Q += first * sq_t + h * sq_h
    K += first * sk_t + (h // G) * sk_h
    V += first * sv_t + (h // G) * sv_h
    scale2 = scale * 1.4426950408889634
    q1, q2 = load_tile_pair(Q, m0, sq_t, T, BM, D1, D2, D)
    limit = offset + m0 + tl.arange(0, BM)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    whole = (offset + m0 + 1) // BN * BN  # tiles of keys that every row sees need no mask
    for n in range(0, whole, BN):
        acc, l, m = _attend_tile(
            q1, q2, K, V, n, limit, sk_t, sv_t, S, scale2, acc, l, m, D, DV, D1, D2, BDV, BM, BN, False
        )  # fmt: skip
    for n in range(whole, min(S, offset + m0 + BM), BN):
        acc, l, m = _attend_tile(
            q1, q2, K, V, n, limit, sk_t, sv_t, S, scale2, acc, l, m, D, DV, D1, D2, BDV, BM, BN, True
        )  # fmt: skip
    store_tile(O + first * so_t + h * so_h, m0, so_t, T, acc / l[:, None], BM, 0, BDV, DV)
    row = m0 + tl.arange(0, BM)
    tl.store(LSE + h * total + first + row, m + tl.math.log2(l), mask=row < T)


@triton.jit
def _query_gradient_tile(
    q1, q2, do, lse, delta, K, V, n, limit, sk_t, sv_t, S, scale2, dq1, dq2,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    k1, k2 = load_tile_pair(K, n, sk_t, S, BN, D1, D2, D, MASK)
    p = tl.math.exp2(dot_pair(q1, q2, k1, k2, BM, BN, D2) * scale2 - lse[:, None])
    if MASK:
        p = tl.where((n + tl.arange(0, BN))[None, :] <= limit[:, None], p, 0.0)
    v = load_tile(V, n, sv_t, S, BN, 0, BDV, DV, MASK)
    dp = dot(do, v.T, tl.zeros((BM, BN), tl.float32))
    ds = (p * (dp - delta[:, None])).to(k1.dtype)
    dq1 = dot(ds, k1, dq1)
    if D2 > 0:
        dq2 = dot(ds, k2, dq2)
    return dq1, dq2


@triton.jit(do_not_specialize=["T", "S", "offset", "total"])
def _query_gradient(
    Q, K, V, DO, LSE, DELTA, DQ, CU, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, sd_t, sd_h, sg_t, sg_h, T, S, offset, scale,
    total, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr,
    VARLEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, T, _, S = _sequence(CU, T, S, offset, VARLEN)
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if m0 >= T:
        return
    h = tl.program_id(1).to(tl.int64)
    Q += first * sq_t + h * sq_h
    K += first * sk_t + (h // G) * sk_h
    V += first * sv_t + (h // G) * sv_h
    scale2 = scale * 1.4426950408889634
    q1, q2 = load_tile_pair(Q, m0, sq_t, T, BM, D1, D2, D)
    dq1 = tl.zeros((BM, D1), tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros((BM, D2), tl.float32)
    do = load_tile(DO + first * sd_t + h * sd_h, m0, sd_t, T, BM, 0, BDV, DV, True)
    row = m0 + tl.arange(0, BM)
    lse = tl.load(LSE + h * total + first + row, mask=row < T, other=float("inf"))  # p = 0 in rows that do not exist
    delta = tl.load(DELTA + h * total + first + row, mask=row < T, other=0.0)
    whole = (offset + m0 + 1) // BN * BN
    for n in range(0, whole, BN):
        dq1, dq2 = _query_gradient_tile(
            q1, q2, do, lse, delta, K, V, n, offset + row, sk_t, sv_t, S, scale2, dq1, dq2,
            D, DV, D1, D2, BDV, BM, BN, False,
        )  # fmt: skip
    for n in range(whole, min(S, offset + m0 + BM), BN):
        dq1, dq2 = _query_gradient_tile(
            q1, q2, do, lse, delta, K, V, n, offset + row, sk_t, sv_t, S, scale2, dq1, dq2,
            D, DV, D1, D2, BDV, BM, BN, True,
        )  # fmt: skip
    DQ += first * sg_t + h * sg_h
    store_tile(DQ, m0, sg_t, T, dq1 * scale, BM, 0, D1, D)
    if D2 > 0:
        store_tile(DQ, m0, sg_t, T, dq2 * scale, BM, D1, D2, D)


@triton.jit
def _key_gradient_tile(
    k1, k2, v, Q, DO, LSE, DELTA, m0, key, offset, sq_t, sd_t, T, scale2, dk1, dk2, dv,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    q1, q2 = load_tile_pair(Q, m0, sq_t, T, BM, D1, D2, D)
    row = m0 + tl.arange(0, BM)
    lse = tl.load(LSE + row, mask=row < T, other=float("inf"))
    p = tl.math.exp2(dot_pair(k1, k2, q1, q2, BN, BM, D2) * scale2 - lse[None, :])
    if CAUSAL:
        p = tl.where(key[:, None] <= offset + row[None, :], p, 0.0)
    do = load_tile(DO, m0, sd_t, T, BM, 0, BDV, DV, True)
    dv = dot(p.to(do.dtype), do, dv)
    dp = dot(v, do.T, tl.zeros((BN, BM), tl.float32))
    delta = tl.load(DELTA + row, mask=row < T, other=0.0)
    ds = (p * (dp - delta[None, :])).to(q1.dtype)
    dk1 = dot(ds, q1, dk1)
    if D2 > 0:
        dk2 = dot(ds, q2, dk2)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["T", "S", "offset", "total"])
def _key_gradient(
    Q, K, V, DO, LSE, DELTA, DK, DV_, CU, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, sd_t, sd_h, sgk_t, sgk_h, sgv_t, sgv_h,
    T, S, offset, scale, total, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, BDV: tl.constexpr, VARLEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys: the group's heads are summed here, so no gradient is written twice."""
    first, T, S, seen = _sequence(CU, T, S, offset, VARLEN)
    n0 = tl.program_id(0) * BN  # the first keys are seen by the most queries: longest first already
    if n0 >= S:
        return
    h = tl.program_id(1).to(tl.int64)
    K += first * sk_t + h * sk_h
    V += first * sv_t + h * sv_h
    scale2 = scale * 1.4426950408889634
    k1, k2 = load_tile_pair(K, n0, sk_t, seen, BN, D1, D2, D)
    dk1 = tl.zeros((BN, D1), tl.float32)
    dk2 = dk1
    if D2 > 0:
        dk2 = tl.zeros((BN, D2), tl.float32)
    v = load_tile(V, n0, sv_t, seen, BN, 0, BDV, DV, True)
    dv = tl.zeros((BN, BDV), tl.float32)
    key = n0 + tl.arange(0, BN)
    start = max(0, n0 - offset) // BM * BM  # the first tile of queries that sees any of these keys
    whole = min(T, tl.cdiv(max(0, n0 + BN - 1 - offset), BM) * BM)  # from here on every query sees all of them
    for g in range(G):
        query = h * G + g
        Qg, DOg = Q + first * sq_t + query * sq_h, DO + first * sd_t + query * sd_h
        LSEg, DELTAg = LSE + query * total + first, DELTA + query * total + first
        for m0 in range(start, whole, BM):
            dk1, dk2, dv = _key_gradient_tile(
                k1, k2, v, Qg, DOg, LSEg, DELTAg, m0, key, offset, sq_t, sd_t, T, scale2, dk1, dk2, dv,
                D, DV, D1, D2, BDV, BM, BN, True,
            )  # fmt: skip
        for m0 in range(max(start, whole), T, BM):
            dk1, dk2, dv = _key_gradient_tile(
                k1, k2, v, Qg, DOg, LSEg, DELTAg, m0, key, offset, sq_t, sd_t, T, scale2, dk1, dk2, dv,
                D, DV, D1, D2, BDV, BM, BN, False,
            )  # fmt: skip
    DK += first * sgk_t + h * sgk_h
    store_tile(DK, n0, sgk_t, S, dk1 * scale, BN, 0, D1, D)
    if D2 > 0:
        store_tile(DK, n0, sgk_t, S, dk2 * scale, BN, D1, D2, D)
    store_tile(DV_ + first * sgv_t + h * sgv_h, n0, sgv_t, S, dv, BN, 0, BDV, DV)
