"""NSA without a GPU and without a compiler: blocked, threaded, in float32 whatever the dtype of q.

Products of bfloat16 would be quicker, but torch rounds their results to bfloat16: the error was 2.7 times that of
PyTorch's own attention, which keeps scores in float32.

Nothing of size T x S or T x S/d is held: a tile is some 64 queries of one key head against all its compressed keys.
Three passes over the queries of a chunk, each a list of independent tasks (`rows.over_tasks`):

1. per tile of queries: compressed branch, block choice, window branch, and the forced blocks of the selected branch
   (the same for neighbouring queries, so one dense product);
2. per selection block: all queries of the chunk that chose it, gathered, times its keys and values. Gathering the
   blocks per query instead moves 16 x 32 KB per query and head (float32, D = 64) and ran at 1-2 GB/s; gathering
   queries moves 0.8 KB per choice;
3. per tile: the parts of the selected branch are merged by their row maxima, as in flash attention.

A single query (decode) has its own pass without tiles. Same signatures and results as `reference`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.reference import Phi, select_blocks
from nsa_kernels.rows import over_tasks
from nsa_kernels.variant import Variant

__all__ = ["compress", "dense_attention", "nsa_attention"]

TILE = 64  # queries per tile: with G = 3 and 1024 compressed keys the scores take 0.8 MB, about a core's L2
MERGE_ROWS = 256
GATHER_ROWS = 16
LOG2_E = math.log2(math.e)  # in the scores, so that exp2 does: 1.8 G elements/s a thread, exp 0.3 in place


def compress(x: Tensor, variant: Variant, phi: Phi = None, position: Tensor | None = None) -> Tensor:
    """As `reference.compress`. Means are sums of d tokens, each summed once, of which overlapping blocks share."""
    l, d = variant.compress_block, variant.compress_stride
    NC = variant.compressed_count(x.shape[0])
    if phi is not None or NC == 0:
        return reference.compress(x, variant, phi, position)
    runs = x.transpose(0, 1)[:, : (NC - 1) * d + l].unflatten(1, (-1, d)).sum(2, dtype=torch.float32)  # (HKV, ., D)
    mean = sum(runs[:, i : i + NC] for i in range(l // d)) / l
    if position is not None:
        mean += position.float().mean(1, keepdim=True)
    return mean.transpose(0, 1).to(x.dtype)


class Part(NamedTuple):
    """Unnormalized softmax over some of a row's keys: o = sum 2^(s - m) v, l = sum 2^(s - m), m = max s."""

    o: Tensor  # (..., G, Dv)
    m: Tensor  # (..., G)
    l: Tensor  # (..., G)


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
    """All three branches; shapes and results as in `reference.nsa_attention`. Keys may be of a narrower dtype."""
    T, HQ, D = q.shape
    HKV = k.shape[1]
    scale = LOG2_E * (D**-0.5 if scale is None else scale)
    heads = []
    for h in range(HKV):
        group = slice(h * (HQ // HKV), (h + 1) * (HQ // HKV))
        q_slc = q[:, group].float() * scale
        heads.append(
            Head(
                q=q_slc,
                q_cmp=q_slc if q_cmp is None or q_cmp is q else q_cmp[:, group].float() * scale,
                k=k[:, h],
                v=v[:, h],
                k_cmp=k_cmp[:, h],
                v_cmp=v_cmp[:, h],
                k_swa=k[:, h] if k_swa is None else k_swa[:, h],
                v_swa=v[:, h] if v_swa is None else v_swa[:, h],
                gates=gates[:, group].float(),
            )
        )
    o, chosen = (_one_query if T == 1 else _many_queries)(heads, variant, offset)
    return o.to(q.dtype), chosen


class Head(NamedTuple):
    """One key head and the G query heads of its group; queries carry the softmax scale, times log2 e for exp2."""

    q: Tensor  # (T, G, D)
    q_cmp: Tensor  # (T, G, D), other than q only where compression is of un-roped keys
    k: Tensor  # (S, D)
    v: Tensor  # (S, Dv)
    k_cmp: Tensor  # (NC, D)
    v_cmp: Tensor  # (NC, Dv)
    k_swa: Tensor  # (S, D)
    v_swa: Tensor  # (S, Dv)
    gates: Tensor  # (T, G, 3)


def _many_queries(heads: list[Head], variant: Variant, offset: int) -> tuple[Tensor, Tensor]:
    T, G, _ = heads[0].q.shape
    Dv = heads[0].v.shape[1]
    outputs = heads[0].q.new_empty(T, len(heads), G, Dv)
    chosen = torch.empty(T, len(heads), variant.select_count, dtype=torch.int32)
    forced = [_empty_part(T, G, Dv) for _ in heads]

    def dense_parts(rows: slice) -> None:
        tile = [head._replace(q=head.q[rows], q_cmp=head.q_cmp[rows], gates=head.gates[rows]) for head in heads]
        first, out = offset + rows.start, outputs[rows].unbind(1)
        importance = _compressed_branch(tile, variant, first, out)
        chosen[rows] = select_blocks(importance, variant, first)
        _window_branch(tile, variant, first, out)
        _forced_blocks(tile, variant, first, [Part(*(x[rows] for x in part)) for part in forced])

    over_tasks(dense_parts, _tiles(T, TILE))
    for h, head in enumerate(heads):
        parts, position = _chosen_blocks(head, _free_choices(chosen[:, h], variant, offset), variant)

        def merge(rows: slice, h=h, parts=parts, position=position) -> None:
            o_slc = _merge(forced[h], parts, position, rows)
            outputs[rows, h] += heads[h].gates[rows, :, 1:2] * o_slc.to(outputs.dtype)

        over_tasks(merge, _tiles(T, MERGE_ROWS))
    return outputs.flatten(1, 2), chosen


def _compressed_branch(tile: list[Head], variant: Variant, first: int, out: Sequence[Tensor]) -> Tensor:
    """Writes g_cmp * o_cmp to out, (R, G, Dv) per head, for R queries from position `first` on.

    Returns block importance (R, HKV, NB) for the blocks that exist by the last of them.
    """
    R, G, _ = tile[0].q.shape
    NB = variant.block_count(first + R)
    seen = variant.compressed_count(first + 1)  # blocks that the first query sees
    NC = variant.compressed_count(first + R)  # ... and the last one
    importance = torch.zeros(R, len(tile), NB)
    if NC == 0:
        for o in out:
            o.zero_()
        return importance
    ends = torch.arange(seen, NC) * variant.compress_stride + variant.compress_block - 1
    mask = _mask(ends <= torch.arange(first, first + R)[:, None])  # (R, NC - seen): the others are visible to all
    for h, head in enumerate(tile):
        s = _scores(head.q_cmp, head.k_cmp[:NC])
        s.view(R, G, NC)[:, :, seen:].add_(mask[:, None])
        m = s.amax(1, keepdim=True)
        if seen == 0:
            m = m.clamp(min=torch.finfo(s.dtype).min)  # rows that see no block: p = 0, not NaN
        p = s.sub_(m).exp2_()
        p.mul_(p.sum(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny).reciprocal())
        o = _values(p, head.v_cmp[:NC]).view(R, G, -1)
        torch.mul(o.to(out[h].dtype), head.gates[..., :1], out=out[h])
        _add_importance(p.view(R, G, NC).sum(1), variant, importance[:, h])
    return importance


def _add_importance(p: Tensor, variant: Variant, importance: Tensor) -> None:
    """Eq. 9: adds the group's compression probabilities (R, NC) to the importance of selection blocks (R, NB)."""
    ratio = variant.select_block // variant.compress_stride
    for offset, weight in variant.importance_weights.items():
        first = max(0, -(offset // ratio))  # the first block whose term is not before block 0
        terms = p[:, first * ratio + offset :: ratio][:, : importance.shape[1] - first]
        importance[:, first : first + terms.shape[1]].add_(terms, alpha=weight)


def _window_branch(tile: list[Head], variant: Variant, first: int, out: Sequence[Tensor]) -> None:
    """Adds g_swa * o_swa to out, (R, G, Dv) per head."""
    if variant.window == 0:
        return
    R, G, _ = tile[0].q.shape
    stop, low = first + R, max(0, first - variant.window + 1)
    position, token = torch.arange(first, stop)[:, None], torch.arange(low, stop)
    mask = _mask((token <= position) & (token > position - variant.window))  # (R, keys)
    for o, head in zip(out, tile, strict=True):
        s = _scores(head.q, head.k_swa[low:stop])
        s.view(R, G, -1).add_(mask[:, None])
        p = s.sub_(s.amax(1, keepdim=True)).exp2_()
        weight = head.gates[..., 2] / p.sum(1).view(R, G)
        o.addcmul_(_values(p, head.v_swa[low:stop]).view(R, G, -1).to(o.dtype), weight[..., None].to(o.dtype))


def _forced_blocks(tile: list[Head], variant: Variant, first: int, parts: list[Part]) -> None:
    """The selected branch over the initial and local blocks of a tile's queries, one part a head."""
    size, (R, G, _) = variant.select_block, tile[0].q.shape
    stop = first + R
    initial = min(variant.initial_blocks * size, stop)
    low = max(initial, (first // size - variant.local_blocks + 1) * size)
    position = torch.arange(first, stop)[:, None]
    token = torch.cat([torch.arange(initial), torch.arange(low, stop)])
    local = token >= (position // size - variant.local_blocks + 1) * size
    mask = _mask((token <= position) & (local | (token < initial)))  # (R, keys)
    for part, head in zip(parts, tile, strict=True):
        k, v = (torch.cat([x[:initial], x[low:stop]]) for x in (head.k, head.v))
        s = _scores(head.q, k)
        s.view(R, G, -1).add_(mask[:, None])
        _partial(s, v, part.o.view(R * G, -1), part.m.view(-1), part.l.view(-1))


def _free_choices(chosen: Tensor, variant: Variant, offset: int) -> Tensor:
    """The chosen blocks (T, n) without the forced ones, compacted to the left: (T, F), -1 = none."""
    none = torch.iinfo(chosen.dtype).max
    current = torch.arange(offset, offset + chosen.shape[0])[:, None] // variant.select_block
    free = (chosen >= variant.initial_blocks) & (chosen <= current - variant.local_blocks)
    width = int(free.sum(1).max())
    compact = chosen.masked_fill(~free, none).sort(1).values[:, :width]
    return compact.masked_fill(compact == none, -1).long()


def _chosen_blocks(head: Head, free: Tensor, variant: Variant) -> tuple[Part, Tensor]:
    """The selected branch over freely chosen blocks, which lie wholly in the past: no mask.

    free: (T, F). Returns P parts, and position (T, F') of each query's parts among them, -1 = none.
    """
    blocks = free[free >= 0].unique().numel()
    if blocks > free.shape[0]:
        return _by_query(head, free, variant)
    return _by_block(head, free, variant)


def _by_block(head: Head, free: Tensor, variant: Variant) -> tuple[Part, Tensor]:
    """One part per (query, block), in the order of blocks, so that a block's queries are neighbours."""
    T, F = free.shape
    _, G, D = head.q.shape
    size = variant.select_block
    pairs = (free.flatten() >= 0).nonzero().flatten()
    block, order = free.flatten()[pairs].sort(stable=True)
    pairs = pairs[order]
    position = torch.full((T * F,), -1).index_copy_(0, pairs, torch.arange(pairs.numel()))
    q = head.q.index_select(0, pairs // max(F, 1)).view(-1, D)  # (P*G, D)
    part = _empty_part(pairs.numel(), G, head.v.shape[1])
    o, m, l = part.o.view(-1, part.o.shape[-1]), part.m.view(-1), part.l.view(-1)
    ids, counts = block.unique_consecutive(return_counts=True)
    stops = counts.cumsum(0)
    spans = torch.stack([ids, (stops - counts) * G, stops * G], 1).tolist()  # block, first row, last row + 1

    def attend(spans: list[list[int]]) -> None:
        for j, start, stop in spans:
            keys = slice(j * size, (j + 1) * size)
            s = _scores(q[start:stop], head.k[keys])
            _partial(s, head.v[keys], o[start:stop], m[start:stop], l[start:stop])

    over_tasks(attend, _even_parts(spans, 4 * torch.get_num_threads()))
    return part, position.view(T, F)


def _by_query(head: Head, free: Tensor, variant: Variant) -> tuple[Part, Tensor]:
    """One part per query, over its own gathered blocks: for a few queries that share few blocks."""
    T, F = free.shape
    _, G, D = head.q.shape
    whole = head.k.shape[0] // variant.select_block
    part = _empty_part(T, G, head.v.shape[1])

    def attend(rows: slice) -> None:
        index = free[rows].clamp(min=0).flatten()
        k, v = (
            x[: whole * variant.select_block].unflatten(0, (whole, -1)).index_select(0, index).to(head.q.dtype)
            for x in (head.k, head.v)
        )  # (R*F, l', D)
        R = rows.stop - rows.start
        s = torch.bmm(head.q[rows], k.view(R, -1, D).transpose(1, 2))  # (R, G, F*l')
        absent = (free[rows] < 0).repeat_interleave(variant.select_block, 1)
        s.masked_fill_(absent[:, None], -torch.inf)
        m = s.amax(-1).clamp(min=torch.finfo(s.dtype).min)  # finite where a query has no free choice at all
        p = s.sub_(m[..., None]).exp2_()
        part.m[rows], part.l[rows] = m, p.sum(-1)
        part.o[rows] = torch.bmm(p, v.view(R, -1, v.shape[-1]))

    over_tasks(attend, _tiles(T, GATHER_ROWS))
    return part, torch.arange(T)[:, None]


def _merge(forced: Part, parts: Part, position: Tensor, rows: slice) -> Tensor:
    """o_slc (R, G, Dv) from the forced part and the free parts of each row."""
    index = position[rows]
    R, F = index.shape
    if F == 0:
        return forced.o[rows] / forced.l[rows, :, None]
    flat = index.clamp(min=0).flatten()
    m = parts.m.index_select(0, flat).view(R, F, -1).masked_fill_((index < 0)[:, :, None], -torch.inf)
    top = torch.maximum(forced.m[rows], m.amax(1))  # (R, G)
    w = torch.exp2(m - top[:, None])  # (R, F, G)
    w0 = torch.exp2(forced.m[rows] - top)
    l = w0 * forced.l[rows] + (w * parts.l.index_select(0, flat).view(R, F, -1)).sum(1)
    o = parts.o.index_select(0, flat).view(R, F, *parts.o.shape[1:]).mul_(w[..., None]).sum(1)
    return (o + w0[..., None] * forced.o[rows]) / l[..., None]


def _one_query(heads: list[Head], variant: Variant, offset: int) -> tuple[Tensor, Tensor]:
    """A decode step. Every product is a thin one, bound by reading the keys."""
    _, G, _ = heads[0].q.shape
    out = torch.empty(len(heads), 1, G, heads[0].v.shape[1], dtype=heads[0].q.dtype)
    importance = _compressed_branch(heads, variant, offset, out)
    blocks = select_blocks(importance, variant, offset)  # (1, HKV, n)
    size = variant.select_block
    low = max(0, offset - variant.window + 1)
    for h, head in enumerate(heads):
        index = blocks[0, h]
        index = index[index >= 0].long()
        token = (index[:, None] * size + torch.arange(size)).flatten()
        token = token[: (index.numel() - 1) * size + offset % size + 1]  # the last block is the query's own
        o_slc = _attend(head.q, head.k.index_select(0, token), head.v.index_select(0, token))
        out[h] += head.gates[..., 1:2] * o_slc.to(out.dtype)
        if variant.window:
            o_swa = _attend(head.q, head.k_swa[low : offset + 1], head.v_swa[low : offset + 1])
            out[h] += head.gates[..., 2:] * o_swa.to(out.dtype)
    return out.view(1, -1, out.shape[-1]), blocks


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query's heads (1, G, D) over all of the given keys: (G, Dv) in float32."""
    s = _scores(q, k)
    p = s.sub_(s.amax(1, keepdim=True)).exp2_()
    return _values(p, v) / p.sum(1, keepdim=True)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, offset: int = 0, scale: float | None = None) -> Tensor:
    """Causal full attention by torch's flash kernel, keys before the chunk without a mask. Shapes as in `reference`."""
    T, HQ, D = q.shape
    HKV = k.shape[1]
    grouped = q.view(T, HKV, HQ // HKV, D).permute(1, 2, 0, 3)  # (HKV, G, T, D)

    def flash(k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        k, v = (x.to(q.dtype).transpose(0, 1)[:, None].expand(-1, HQ // HKV, -1, -1) for x in (k, v))
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(grouped, k, v, is_causal=causal, scale=scale)

    o, lse = flash(k[offset : offset + T], v[offset : offset + T], True)
    if offset:
        past, past_lse = flash(k[:offset], v[:offset], False)
        weight = torch.sigmoid(past_lse - lse)[..., None].to(o.dtype)  # exp(a) / (exp(a) + exp(b))
        o = torch.lerp(o, past, weight)
    return o.permute(2, 0, 1, 3).reshape(T, HQ, v.shape[-1])


def _mask(visible: Tensor) -> Tensor:
    """0 where visible, -inf elsewhere: adding it took 24 us where a broadcast masked_fill_ took 393 (192 x 640)."""
    return torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(..., D) queries times (keys, D), flat: (rows, keys) in float32."""
    return torch.mm(q.reshape(-1, q.shape[-1]), k.to(q.dtype).T)


def _values(p: Tensor, v: Tensor) -> Tensor:
    """(rows, keys) weights times (keys, Dv) values, in float32."""
    return torch.mm(p, v.float())


def _partial(s: Tensor, v: Tensor, o: Tensor, m: Tensor, l: Tensor) -> None:
    """Softmax part of scores (rows, keys), overwritten, into o (rows, Dv), m and l (rows,)."""
    torch.amax(s, 1, out=m)
    s.sub_(m[:, None]).exp2_()
    torch.sum(s, 1, out=l)
    torch.mm(s, v.float(), out=o)


def _empty_part(rows: int, G: int, Dv: int) -> Part:
    return Part(torch.empty(rows, G, Dv), torch.empty(rows, G), torch.empty(rows, G))


def _tiles(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _even_parts(items: list, parts: int) -> list[list]:
    """Consecutive parts of about equal length."""
    size = max(1, -(-len(items) // parts))
    return [items[start : start + size] for start in range(0, len(items), size)]
