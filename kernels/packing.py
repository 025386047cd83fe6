"""Packed batches: sequences one after the other, sequence i at tokens cu_seqlens[i] .. cu_seqlens[i+1]-1.

Compressed keys are packed likewise, and within the kernels selection blocks are numbered through the batch. How many
there are only the device knows, and it is not asked: tables have as many rows as there can be, and what is left over
belongs to no sequence and begins where the tokens end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nsa_kernels.variant import Variant


@dataclass(frozen=True)
class Ranges:
    """Which keys a query's sequence has, and which queries a key's: int32 on the device."""

    token: Tensor  # (T,) first token of a query's sequence
    key: Tensor  # (T,) its first key
    begin: Tensor  # (S,) the first query that sees a key
    end: Tensor  # (S,) where its sequence ends


class Packing:
    """Where sequences begin, by token, compressed key and selection block: int32 tables on the device of `cu_seqlens`.

    cu_seqlens: (B+1,) integers, ascending from 0 to `tokens`; a sequence may be empty. One `Packing` serves all layers.
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, variant: Variant) -> None:
        self.variant, self.sequences, self.tokens = variant, cu_seqlens.shape[0] - 1, tokens
        self.keys = tokens // variant.compress_stride  # of `tokens` tokens in any number of sequences, at most
        self.blocks = (tokens + self.sequences * (variant.select_block - 1)) // variant.select_block
        lengths = cu_seqlens.diff()
        counts = (lengths - variant.compress_block).div(variant.compress_stride, rounding_mode="floor") + 1
        self._tokens = _with_the_rest(cu_seqlens)
        self._keys = _with_the_rest(_bounds(counts.clamp(min=0)))
        self._blocks = _with_the_rest(_bounds((lengths + variant.select_block - 1) // variant.select_block))

    @property
    def cu_seqlens(self) -> Tensor:
        """(B+1,) int32."""
        return self._tokens[:-1]

    def _sequence(self, bounds: Tensor, count: int) -> Tensor:
        """Whose each of `count` rows is, B for those left over."""
        return torch.searchsorted(bounds[1:-1], _range(bounds, count), right=True)

    @cached_property
    def _of_token(self) -> Tensor:
        return self._sequence(self._tokens, self.tokens)

    @cached_property
    def _of_key(self) -> Tensor:
        return self._sequence(self._keys, self.keys)

    @cached_property
    def _of_block(self) -> Tensor:
        return self._sequence(self._blocks, self.blocks)

    @cached_property
    def first_token(self) -> Tensor:
        """(tokens,) first token of each token's sequence."""
        return self._tokens[self._of_token]

    @cached_property
    def position(self) -> Tensor:
        """(tokens,) of each token in its sequence."""
        return _range(self._tokens, self.tokens) - self.first_token

    @cached_property
    def first_block(self) -> Tensor:
        """(tokens,) first selection block of each token's sequence."""
        return self._blocks[self._of_token]

    @cached_property
    def key_token(self) -> Tensor:
        """(keys,) first token of each compressed key."""
        return self._tokens[self._of_key] + self.key_position

    @cached_property
    def key_position(self) -> Tensor:
        """(keys,) the same, counted from its sequence's first."""
        return (_range(self._keys, self.keys) - self._keys[self._of_key]) * self.variant.compress_stride

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor]:
        """(blocks,) first token of each selection block, and where its sequence ends."""
        first = self._tokens[self._of_block] + self._within_block * self.variant.select_block
        return first, self._tokens[1:][self._of_block]

    @cached_property
    def block_key(self) -> Tensor:
        """(blocks,) first of the compressed keys that begin in it."""
        per_block = self.variant.select_block // self.variant.compress_stride
        return self._keys[self._of_block] + self._within_block * per_block

    @cached_property
    def _within_block(self) -> Tensor:
        return _range(self._blocks, self.blocks) - self._blocks[self._of_block]

    @cached_property
    def compressed(self) -> Ranges:
        """Of queries and compressed keys."""
        begin = self.key_token + (self.variant.compress_block - 1)
        return Ranges(self.first_token, self._keys[self._of_token], begin, self._tokens[1:][self._of_key])

    @cached_property
    def window(self) -> Ranges:
        """Of queries and tokens."""
        begin = _range(self._tokens, self.tokens)
        return Ranges(self.first_token, self.first_token, begin, self._tokens[1:][self._of_token])

    def one_by_one(
        self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, **own
    ) -> tuple[Tensor, Tensor]:
        """`attention` of one sequence after the other, for implementations that know no packing."""
        lengths = self.cu_seqlens.diff().tolist()
        counts = [self.variant.compressed_count(length) for length in lengths]
        rows = {name: x.split(lengths) for name, x in dict(own, q=q, k=k, v=v, gates=gates).items() if _is_tensor(x)}
        rows |= {name: x[: sum(counts)].split(counts) for name, x in dict(k_cmp=k_cmp, v_cmp=v_cmp).items()}
        common = {name: x for name, x in own.items() if not _is_tensor(x)}
        found = [
            attention(**dict(zip(rows, parts, strict=True)), variant=self.variant, **common)
            for parts in zip(*rows.values(), strict=True)
        ]
        none = torch.empty(0, k.shape[1], self.variant.select_count, device=q.device, dtype=torch.int32)
        o, chosen = zip((q.new_empty(0, q.shape[1], v.shape[2]), none), *found, strict=True)
        return torch.cat(o), torch.cat(chosen)


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def _bounds(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _with_the_rest(bounds: Tensor) -> Tensor:
    """(B+2,) int32: the first row of each sequence, and the end twice, where what is left over begins and ends."""
    return torch.cat([bounds, bounds[-1:]]).int()


def _range(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.int32)
