"""What a context leaves behind: keys and values of every layer, plain and compressed. Only this file knows the layout.

Every buffer is (HKV, capacity, D), so that one head's tokens, and one selection block, are contiguous:
`layers.{i}.k`, `.v` per token; `.k_cmp`, `.v_cmp` per compression block; with per-branch projections also
`.k_swa`, `.v_swa` (window) and `.k_src`, `.v_src` (what is compressed). Compressed blocks depend only on tokens that
stay when a context is cut back. Where positions are those of dual chunks (`positions.py`), keys are rotated for the
queries of one chunk and turned when the next one begins, each key twice in all, whatever the length.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_models.config import NSAConfig
from nsa_models.cost import round_capacity
from nsa_models.positions import positions
from nsa_models.rope import Rope, rotate

LAYOUT_VERSION = 1  # part of the fingerprint of stored caches
TURNS_KEPT = 2  # turns that can be taken back bit for bit: a question and its answer pass one or two chunks' ends


class Cache:
    """Keys and values of one sequence, preallocated for `capacity` tokens, `length` of them filled."""

    def __init__(
        self,
        config: NSAConfig,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        compressed_dtype: torch.dtype | None = None,
        rope_factor: float | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        """capacity is rounded up to whole selection blocks. compressed_dtype: None = dtype. rope_factor: None = what
        `capacity` needs. buffers: existing storage, `buffer_shapes` names and shapes (a mapped file); None = allocate.
        """
        self.config = config
        self.capacity = round_capacity(config, capacity)
        self.length = 0
        self.chunk = 0  # whose queries keys are rotated for
        self._turns: deque[_Turn] = deque(maxlen=TURNS_KEPT)
        self.dtype = dtype
        self.compressed_dtype = compressed_dtype or dtype
        self.rope_factor = config.rope_factor(capacity) if rope_factor is None else rope_factor
        if buffers is None:
            buffers = {
                name: torch.empty(shape, device=device, dtype=self.buffer_dtype(name))
                for name, shape in buffer_shapes(config, self.capacity).items()
            }
        self.buffers = buffers

    @classmethod
    def for_model(
        cls, model, capacity: int, rope_factor: float | None = None, device: torch.device | str | None = None
    ) -> "Cache":
        """The cache that `prefill` and `decode` use: keys and values in bfloat16 (half the memory; at 128k the
        built-in model's are 3 GB), compressed ones in the model's own dtype, since every step reads all of them.
        device: None = the model's; "meta" = names, shapes and dtypes alone.
        """
        wide = model.dtype == torch.float64
        dtype = torch.float64 if wide else torch.bfloat16
        return cls(model.config, capacity, device or model.device, dtype, model.dtype, rope_factor)

    def buffer_dtype(self, name: str) -> torch.dtype:
        return self.compressed_dtype if name.endswith("_cmp") else self.dtype

    def write(self, layer: int, start: int, **values: Tensor) -> None:
        """Store `k=`, `v=`, ... of shape (T, HKV, D) at tokens start .. start+T-1 of one layer."""
        for name, value in values.items():
            buffer = self.buffers[f"layers.{layer}.{name}"]
            buffer[:, start : start + value.shape[0]] = value.transpose(0, 1)

    def read(self, layer: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A (stop-start, HKV, D) view of one layer's `k`, `v`, `k_cmp`, ..."""
        return self.buffers[f"layers.{layer}.{name}"][:, start:stop].transpose(0, 1)

    def require_room(self, tokens: int) -> None:
        """Raise ValueError where fewer than `tokens` fit: kernels write where they are told."""
        if self.length + tokens > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot take {tokens} after {self.length}")

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.restore(length, self.chunk)

    def restore(self, length: int, chunk: int) -> None:
        """Take the first `length` tokens for filled, whose keys are rotated for the queries of `chunk`."""
        self.length, self.chunk = length, chunk
        if self.config.position_chunk:
            self._turn_back(max(length - 1, 0) // self.config.position_chunk)

    def positions(self, start: int, stop: int) -> Tensor:
        """(stop-start,): where tokens stand for the rotation of their keys, and of queries of the chunk at hand."""
        return positions(self.config, torch.arange(start, stop), self.chunk)

    def turn(self) -> int | None:
        """Make keys ready for the next token. Returns how many tokens may come until the next turn; None = any."""
        size = self.config.position_chunk
        if not size:
            return None
        if self.chunk != self.length // size:
            self._turn_to(self.length // size)
        return size - self.length % size

    def _turn_to(self, chunk: int) -> None:
        """Rotate keys for the queries of another chunk; what they were goes on the stack of turns."""
        token = torch.arange(self.length)
        by = positions(self.config, token, chunk) - positions(self.config, token, self.chunk)
        turn, self.chunk = _Turn(self.chunk, {}), chunk
        self._turns.append(turn)
        if not by.any():  # the first two chunks see one another as they stand
            return
        try:
            self._rotate(by, int(by.nonzero()[0]), turn)
        except BaseException:  # Ctrl-C too: all keys or none
            self._undo()
            raise

    def _rotate(self, by: Tensor, first: int, turn: "_Turn") -> None:
        """Rotate the keys of token `first`, with which a selection block begins, and of all behind it."""
        wide = torch.promote_types(self.dtype, torch.float32)
        rope, filled = Rope(self.config), self.tensors()
        for name, step in _rotated(self.config).items():
            keys = filled[name][:, first // step :]
            turn.rows[name] = first // step, keys.clone()
            angles = rope.angles(by[first::step][: keys.shape[1]], wide)
            cos, sin = (x.to(keys.device) for x in angles)
            keys.copy_(rotate(keys.transpose(0, 1).to(wide), cos, sin).transpose(0, 1))

    def _undo(self) -> None:
        """Take the last turn back."""
        turn = self._turns.pop()
        for name, (start, keys) in turn.rows.items():
            self.buffers[name][:, start : start + keys.shape[1]] = keys
        self.chunk = turn.chunk

    def _turn_back(self, chunk: int) -> None:
        """As if `chunk` had not ended: bit for bit where the turns since are kept, else but for rounding."""
        while self._turns and self.chunk > chunk:
            self._undo()
        if self.chunk > chunk:
            self._turn_to(chunk)
            self._turns.clear()

    def tensors(self, length: int | None = None) -> dict[str, Tensor]:
        """Every buffer cut to its first `length` tokens, None = all: (HKV, tokens or compressed blocks, D) views."""
        length = self.length if length is None else length
        compressed = self.config.variant.compressed_count(length)
        return {
            name: buffer[:, : compressed if name.endswith("_cmp") else length] for name, buffer in self.buffers.items()
        }


class _Turn(NamedTuple):
    """What a turn replaced."""

    chunk: int  # whose queries keys were rotated for before it
    rows: dict[str, tuple[int, Tensor]]  # buffer -> first row, and what was there and behind


def _rotated(config: NSAConfig) -> dict[str, int]:
    """Buffer -> tokens from one row to the next, of those that hold rotated keys."""
    rows = {"k": 1}
    if config.branch_kv:
        rows["k_swa"] = 1
    if config.branch_kv and config.compress_rope == "before":
        rows["k_src"] = 1
    if config.compress_rope != "none":
        rows["k_cmp"] = config.compress_stride
    return {f"layers.{i}.{name}": step for i in range(config.num_hidden_layers) for name, step in rows.items()}


def buffer_shapes(config: NSAConfig, capacity: int) -> dict[str, tuple[int, int, int]]:
    """Name -> (HKV, rows, width) of every buffer of a cache of `capacity` tokens (a whole number of blocks)."""
    D, Dv, H = config.head_dim, config.v_head_dim, config.num_kv_heads
    rows = config.variant.compressed_count(capacity)
    names = {"k": (capacity, D), "v": (capacity, Dv), "k_cmp": (rows, D), "v_cmp": (rows, Dv)}
    if config.branch_kv:
        names |= {
            "k_swa": (capacity, D),
            "v_swa": (capacity, Dv),
            "k_src": (capacity, D),
            "v_src": (capacity, Dv),
        }
    return {f"layers.{i}.{n}": (H, *size) for i in range(config.num_hidden_layers) for n, size in names.items()}
