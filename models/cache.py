"""What a context leaves behind: keys and values of every layer, plain and compressed. Only this file knows the layout.

Every buffer is (HKV, capacity, D), so that one head's tokens, and one selection block, are contiguous:
`layers.{i}.k`, `.v` per token; `.k_cmp`, `.v_cmp` per compression block; with per-branch projections also
`.k_swa`, `.v_swa` (window) and `.k_src`, `.v_src` (what is compressed). Nothing else is state: a context is cut back by
lowering `length`, since compressed blocks depend only on tokens that stay.
"""

import torch
from torch import Tensor

from nsa_models.config import NSAConfig
from nsa_models.cost import round_capacity

LAYOUT_VERSION = 1  # part of the fingerprint of stored caches


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
        length: int = 0,
    ) -> None:
        """capacity is rounded up to whole selection blocks. compressed_dtype: None = dtype. rope_factor: None = what
        `capacity` needs. buffers: existing storage, `buffer_shapes` names and shapes (a mapped file), filled up to
        `length`; None = allocate.
        """
        self.config = config
        self.capacity = round_capacity(config, capacity)
        self.length = length
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
        self.length = length

    def tensors(self, length: int | None = None) -> dict[str, Tensor]:
        """Every buffer cut to its first `length` tokens, None = all: (HKV, tokens or compressed blocks, D) views."""
        length = self.length if length is None else length
        compressed = self.config.variant.compressed_count(length)
        return {
            name: buffer[:, : compressed if name.endswith("_cmp") else length] for name, buffer in self.buffers.items()
        }


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
