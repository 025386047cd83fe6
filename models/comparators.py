"""Other ways to read few tokens of a long context, on the same weights: what NSA is compared with.

Plain and not fast: each decides which tokens a query may see, and exact attention does the rest. `budget` is how many
tokens of a key head a step reads, the same for all: the query heads that share a key head share what they read, as in
NSA. Positions stay those of the text.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from nsa_models.config import NSAConfig

# (layer, q (T, HQ, D), k (S, HKV, D), v (S, HKV, Dv), start): T queries from token `start` on -> o (T, HQ, Dv)
Attention = Callable[[int, Tensor, Tensor, Tensor, int], Tensor]
MOST_SCORES = 1 << 25  # held at once


class Streaming:
    """Attention sinks and a window (StreamingLLM, arXiv 2309.17453)."""

    SINKS = 4

    def __init__(self, config: NSAConfig, budget: int) -> None:
        self.window = max(budget - self.SINKS, 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        token = torch.arange(start + q.shape[0], device=q.device)

        def visible(rows: slice) -> Tensor:
            position = token[start:][rows, None]
            return ((token < self.SINKS) | (token > position - self.window))[:, None]

        return masked_attention(q, k, v, start, visible)


class Quest:
    """The pages whose keys could score highest, by their smallest and largest coordinates (arXiv 2406.10774).

    A group of query heads chooses by the sum of its bounds; the page of the query is among its pages.

    The paper's models have a key head for each query head, and its first two layers read everything, beyond the budget.
    With both, and a budget of 1,536 of 8,192 tokens, a step of the built-in model read 2,676 of a key head (the mean of
    the layers), and perplexity of a window of psutil was 6.619 (networkx 4.36); chosen by the group 1,980 and 6.631
    (4.27); by the group in all layers, as here, 1,536 and 6.621.
    """

    PAGE = 16

    def __init__(self, config: NSAConfig, budget: int) -> None:
        self.pages = -(-budget // self.PAGE)  # in whole ones: all of a text that the budget holds

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        S = start + q.shape[0]
        page = torch.arange(S, device=q.device) // self.PAGE
        low, high = self._bounds(k[:S])  # (pages, HKV, D)

        def visible(rows: slice) -> Tensor:
            asked = q[rows].float().unflatten(1, (k.shape[1], -1))
            bound = torch.einsum("thd,phd->thp", asked.clamp(min=0).sum(2), high)
            bound += torch.einsum("thd,phd->thp", asked.clamp(max=0).sum(2), low)
            own = page[start:][rows, None, None]
            every = torch.arange(low.shape[0], device=q.device)
            bound = bound.masked_fill(every == own, torch.inf).masked_fill(every > own, -torch.inf)
            best = bound.topk(min(self.pages, bound.shape[-1]), -1).indices
            return torch.zeros_like(bound, dtype=torch.bool).scatter_(-1, best, True)[..., page]

        return masked_attention(q, k, v, start, visible)

    def _bounds(self, k: Tensor) -> tuple[Tensor, Tensor]:
        missing = -k.shape[0] % self.PAGE
        last = k[-1:].expand(missing, *k.shape[1:])
        pages = torch.cat([k, last]).unflatten(0, (-1, self.PAGE))
        return pages.amin(1).float(), pages.amax(1).float()


class HeavyHitters:
    """Half of the budget recent tokens, half those that got most attention so far (H2O, arXiv 2306.14048).

    What is dropped never comes back. Each key head keeps its own tokens; they are chosen anew every `PIECE` tokens.
    """

    PIECE = 64

    def __init__(self, config: NSAConfig, budget: int) -> None:
        self.recent, self.heavy = budget - budget // 2, budget // 2
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> tokens (HKV, B) in order, their mass (HKV, B)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        pieces = [self._piece(layer, q[i : i + self.PIECE], k, v, start + i) for i in range(0, q.shape[0], self.PIECE)]
        return torch.cat(pieces)

    def _piece(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        T, HQ, D = q.shape
        HKV = k.shape[1]
        if start == 0:
            empty = torch.zeros(HKV, 0, dtype=torch.long, device=q.device)
            self.kept[layer] = empty, empty.float()
        tokens, mass = self.kept[layer]
        new = torch.arange(start, start + T, device=q.device)
        tokens = torch.cat([tokens, new.expand(HKV, T)], 1)  # (HKV, B)
        heads = torch.arange(HKV, device=q.device)[:, None]
        keys, values = k[tokens, heads].float(), v[tokens, heads].float()  # (HKV, B, D)
        scores = torch.einsum("thgd,hbd->hgtb", q.float().unflatten(1, (HKV, -1)), keys) * D**-0.5
        p = scores.masked_fill(tokens[:, None, None] > new[:, None], -torch.inf).softmax(-1)
        mass = torch.cat([mass, mass.new_zeros(HKV, T)], 1) + p.sum((1, 2))
        self.kept[layer] = self._keep(tokens, mass, start + T)
        return torch.einsum("hgtb,hbd->thgd", p, values).reshape(T, HQ, -1).to(q.dtype)

    def _keep(self, tokens: Tensor, mass: Tensor, length: int) -> tuple[Tensor, Tensor]:
        if tokens.shape[1] <= self.recent + self.heavy:
            return tokens, mass
        rank = mass.masked_fill(tokens >= length - self.recent, torch.inf)
        best = rank.topk(self.recent + self.heavy, 1).indices.sort(1).values
        return tokens.gather(1, best), mass.gather(1, best)


COMPARATORS: dict[str, type] = {"h2o": HeavyHitters, "quest": Quest, "streaming": Streaming}


def masked_attention(q: Tensor, k: Tensor, v: Tensor, start: int, visible: Callable[[slice], Tensor]) -> Tensor:
    """Causal attention of T queries from token `start` on over what `visible` lets them see, in float32.

    visible: rows -> (rows, 1 | HKV, S) bool. q: (T, HQ, D); k, v: (S, HKV, D | Dv).
    """
    T, HQ, _ = q.shape
    S = start + T
    keys, values = (x[:S].float().transpose(0, 1)[None] for x in (k, v))
    token, parts = torch.arange(S, device=q.device), []
    size = max(MOST_SCORES // (S * HQ), 1)
    for i in range(0, T, size):
        rows = slice(i, min(i + size, T))
        mask = visible(rows) & (token <= token[start:][rows, None])[:, None]
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(HQ // mask.shape[1], 1)
        asked, mask = (x.transpose(0, 1)[None] for x in (q[rows].float(), mask))
        o = functional.scaled_dot_product_attention(asked, keys, values, mask, enable_gqa=True)
        parts.append(o[0].transpose(0, 1))
    return torch.cat(parts).to(q.dtype)
