"""The context that was read last, kept in memory: the next question about it enters where its document ends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_models import Cache, NSAModel

SLACK = 1024  # free rows beyond the first question and answer: most later ones fit without a copy


class Held:
    """At most one cache. It serves exactly the tokens it was kept for, so an answer is the same with and without it."""

    def __init__(self) -> None:
        self._ids: Sequence[int] = ()
        self._cache: Cache | None = None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._cache.buffers.values()) if self._cache else 0

    def keep(self, ids: Sequence[int], cache: "Cache") -> None:
        """cache: whose first len(ids) tokens are `ids`; what is added behind them is dropped at the next `take`."""
        self._ids, self._cache = ids, cache

    def drop(self) -> None:
        self._ids, self._cache = (), None

    def take(self, ids: Sequence[int], capacity: int, model: "NSAModel") -> "Cache | None":
        """The cache of `ids` with room for `capacity` tokens; None if it holds others, or at another RoPE factor."""
        cache = self._cache
        if cache is None or self._ids != ids or cache.rope_factor != model.config.rope_factor(capacity):
            return None
        cache.truncate(len(ids))
        if cache.capacity < capacity:
            cache = grown(cache, capacity, model)
            self.keep(ids, cache)
        return cache


def roomy(model: "NSAModel", capacity: int) -> "Cache":
    """An empty cache as `Cache.for_model` makes for `capacity` tokens, with SLACK more rows."""
    from nsa_models import Cache

    return Cache.for_model(model, capacity + SLACK, model.config.rope_factor(capacity))


def grown(cache: "Cache", capacity: int, model: "NSAModel") -> "Cache":
    """A copy with more rows."""
    larger = roomy(model, capacity)
    filled = cache.tensors()
    for name, rows in larger.tensors(cache.length).items():
        rows.copy_(filled[name])
    larger.restore(cache.length, cache.chunk)
    return larger
