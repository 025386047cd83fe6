"""The numbers that decide which NSA is computed (paper §3.3; public variants differ, see `Variant`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Block geometry and selection rule of one NSA layer.

    The defaults are the paper's: l=32, d=16, l'=64, n=16 of which 1 initial and 2 local, w=512.
    """

    compress_block: int = 32  # l: tokens pooled into one compressed key
    compress_stride: int = 16  # d: tokens between the starts of two compressed blocks
    select_block: int = 64  # l': tokens of one selection block
    select_count: int = 16  # n: blocks attended per query, forced ones included
    initial_blocks: int = 1  # forced: the first blocks of the sequence (attention sink)
    local_blocks: int = 2  # forced: the query's own block and the ones right before it
    window: int = 512  # w: tokens of the sliding window, the query's own included; 0 = no such branch
    importance_map: str = "geometric"  # eq. 9 as token overlap, or "literal": its 0-based indices as printed
    topk: str = "exact"  # or "streamed": fla's merge of halves, which NSA-1B was trained with
    topk_chunk: int = 0  # selection blocks per merge step of the streamed top-k

    def __post_init__(self) -> None:
        positive = ("compress_block", "compress_stride", "select_block", "select_count")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of compress_stride ({self.compress_stride})"
                )
        if self.initial_blocks < 0 or self.local_blocks < 1 or self.window < 0:
            raise ValueError("initial_blocks and window must be at least 0, local_blocks at least 1")
        if self.initial_blocks + self.local_blocks > self.select_count:
            raise ValueError(
                f"forced blocks ({self.initial_blocks} initial + {self.local_blocks} local) exceed "
                f"select_count ({self.select_count})"
            )
        if self.importance_map not in ("geometric", "literal"):
            raise ValueError(f"importance_map must be geometric or literal, got {self.importance_map!r}")
        if self.topk not in ("exact", "streamed"):
            raise ValueError(f"topk must be exact or streamed, got {self.topk!r}")
        if self.topk == "streamed" and (self.topk_chunk < 1 or self.select_count % 2):
            raise ValueError("a streamed top-k needs topk_chunk >= 1 and an even select_count")
        if self.topk == "streamed" and self.initial_blocks + self.local_blocks > self.select_count // 2:
            raise ValueError("a streamed top-k keeps half of select_count per side: more blocks are forced than that")

    @property
    def importance_weights(self) -> dict[int, int]:
        """Eq. 9 as {offset: weight}: block j's importance is the sum of weight * p_cmp[j * l'/d + offset].

        Geometric: the tokens that compression block and selection block share, over d; with (32, 16, 64)
        offsets -1..3 weigh 1, 2, 2, 2, 1. Literal: offsets -m-n as printed, shifted by one block to the left.
        """
        l, d, s = self.compress_block, self.compress_stride, self.select_block
        weights: dict[int, int] = {}
        for m in range(s // d):
            for n in range(l // d):
                offset = m - n if self.importance_map == "geometric" else -m - n
                weights[offset] = weights.get(offset, 0) + 1
        return weights

    def compressed_count(self, tokens: int) -> int:
        """How many compression blocks lie wholly within the first `tokens` tokens (floor: prefix-invariant)."""
        return max(0, (tokens - self.compress_block) // self.compress_stride + 1)

    def block_count(self, tokens: int) -> int:
        """How many selection blocks the first `tokens` tokens touch."""
        return -(-tokens // self.select_block)
