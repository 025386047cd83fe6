"""Prefill and decode. The engine knows token ids, a model and a cache; it knows no text."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nsa_models.cache import Cache
from nsa_models.constrain import Constraint
from nsa_models.errors import BudgetError
from nsa_models.retrieval import RetrievalMass
from nsa_models.sampling import Sampler, Sampling
from nsa_models.step import Step
from nsa_models.transformer import NSAModel

Progress = Callable[[int, int], None]


def prefill(
    model: NSAModel,
    ids: Sequence[int] | Tensor,
    cache: Cache,
    *,
    progress: Progress | None = None,
    chunk: int | None = None,
    retrieval: RetrievalMass | None = None,
    dense: bool = False,
) -> Tensor:
    """Append `ids` to the cache, chunk by chunk, and return the logits (vocab,) that follow the last of them.

    progress is called with (tokens done, tokens in all) after every chunk. retrieval collects where these
    tokens look in the context. A `KeyboardInterrupt` leaves the cache valid up to the last whole chunk.
    """
    ids = torch.as_tensor(ids, dtype=torch.long)
    total = ids.shape[0]
    if total == 0:
        raise ValueError("nothing to prefill")
    limit = min(cache.capacity, model.config.max_position_embeddings)
    if cache.length + total > limit:
        raise BudgetError(
            f"{cache.length + total:,} tokens do not fit: the context holds {limit:,}; "
            f"leave out {cache.length + total - limit:,}"
        )
    size = chunk or chunk_size(cache.length + total, model.device.type)
    for start in range(0, total, size):
        piece = ids[start : start + size]
        hidden = model.advance(piece, cache, dense, retrieval)
        if progress:
            progress(start + piece.shape[0], total)
    return model.logits(hidden[-1:])[0]


def chunk_size(context: int, device: str = "cpu") -> int:
    """Tokens per chunk. A selection block is read once per chunk for all queries that chose it, so longer contexts
    want longer chunks (at 128k and 4096 queries some 26 share a block); short ones want progress and less memory. On a
    GPU a chunk of 30 layers is some 2,000 launches from Python, some 20 ms: few chunks, then.
    """
    if device != "cpu":
        return 16384
    return 1024 if context <= 4096 else 2048 if context <= 32768 else 4096


def decode(
    model: NSAModel,
    cache: Cache,
    logits: Tensor,
    sampling: Sampling,
    *,
    eos_ids: Iterable[int] = (),
    history: Iterable[int] = (),
    dense: bool = False,
    constraint: Constraint | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow, up to an end-of-sequence id (not yielded), `max_tokens` or a full cache.

    logits: (vocab,) of the last token, from `prefill`. history: earlier tokens for the repeat penalty. A token enters
    the cache when the next one is asked for. constraint: which tokens are allowed.
    """
    ends, sampler, advance = frozenset(eos_ids), Sampler(sampling, history), None
    for step in range(sampling.max_tokens):
        token = sampler.pick(constraint.mask(logits) if constraint else logits)
        if token in ends:
            return
        if constraint:
            constraint.advance(token)
        yield token
        if step + 1 == sampling.max_tokens or cache.length >= cache.capacity:
            return
        advance = advance or Step(model, cache, dense)  # a CUDA graph takes some 0.1 s: not for an answer of one token
        logits = advance(token)
