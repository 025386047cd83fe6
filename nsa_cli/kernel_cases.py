"""What `nsa bench kernels` measures: shapes, lengths and batches, and random inputs for each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsa_kernels import Variant

if TYPE_CHECKING:
    import torch

OFFSETS = 2**31  # what 32 bits hold


@dataclass(frozen=True)
class Shape:
    """Heads as `HQxHKVxD`, or `HQxHKVxD/Dv` where values have another width."""

    HQ: int
    HKV: int
    D: int
    Dv: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Raises ValueError."""
        widths, _, value = text.partition("/")
        HQ, HKV, D = (int(part) for part in widths.split("x"))
        shape = cls(HQ, HKV, D, int(value or D))
        if min(shape.HQ, shape.HKV, shape.D, shape.Dv) < 1 or HQ % HKV:
            raise ValueError(text)
        return shape

    def __str__(self) -> str:
        return f"{self.HQ}x{self.HKV}x{self.D}" + (f"/{self.Dv}" if self.Dv != self.D else "")


@dataclass(frozen=True)
class Case:
    kind: str  # forward | backward | decode | ragged | overflow-forward | overflow-backward
    tokens: int
    shape: Shape
    batch: int | None = None  # of decode steps; ragged: of sequences of different lengths

    @property
    def name(self) -> str:
        batch = f"b{self.batch}-" if self.batch else ""
        return f"{self.kind}-{batch}{self.tokens}-{self.shape}"


def cases(lengths: Sequence[int], shapes: Sequence[Shape], batches: Sequence[int]) -> list[Case]:
    """Every case; `overflow` is a sequence whose offsets pass 2^31, checked and not timed."""
    found = []
    for shape in shapes:
        for tokens in lengths:
            found += [Case("forward", tokens, shape), Case("backward", tokens, shape)]
            found += [Case("decode", tokens, shape, batch) for batch in batches]
            found += [Case("ragged", tokens, shape, batch) for batch in batches if batch > 1]
    wide = max(shapes, key=lambda shape: shape.HQ * shape.D)
    tokens = OFFSETS // (wide.HQ * wide.D) + 1024
    return [*found, *(Case(f"overflow-{kind}", tokens, wide) for kind in ("forward", "backward"))]


def prefill_inputs(case: Case, variant: Variant, device, dtype: "torch.dtype") -> dict[str, "torch.Tensor"]:
    """Arguments of `nsa_attention` for one sequence; compressed keys are means, as with an untrained layer."""
    import torch

    from nsa_kernels import reference

    T, s = case.tokens, case.shape
    sizes = {"q": (s.HQ, s.D), "k": (s.HKV, s.D), "v": (s.HKV, s.Dv), "gates": (s.HQ, 3)}
    x = {name: normal(device, dtype, T, *size) for name, size in sizes.items()}
    compressed = {f"{name}_cmp": reference.compress(x[name], variant) for name in ("k", "v")}
    return x | compressed | {"gates": torch.sigmoid(x["gates"])}


def decode_inputs(case: Case, variant: Variant, device, dtype: "torch.dtype") -> dict[str, "torch.Tensor"]:
    """Arguments of `decode_attention`; behind a sequence's length its caches hold NaN."""
    import torch

    s, B, T = case.shape, case.batch, case.tokens
    lengths = [max(1, T * (b + 1) // B - b) for b in range(B)] if case.kind == "ragged" else [T] * B
    rows = variant.compressed_count(T)
    sizes = {"k": (T, s.D), "v": (T, s.Dv), "k_cmp": (rows, s.D), "v_cmp": (rows, s.Dv)}
    caches = {name: normal(device, dtype, B, s.HKV, *size) for name, size in sizes.items()}
    for name, cache in caches.items():
        for b, length in enumerate(lengths):
            cache[b, :, variant.compressed_count(length) if name.endswith("_cmp") else length :] = torch.nan
    return caches | {
        "q": normal(device, dtype, B, s.HQ, s.D),
        "gates": torch.sigmoid(normal(device, dtype, B, s.HQ, 3)),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
    }


def normal(device, dtype: "torch.dtype", *shape: int) -> "torch.Tensor":
    """The same numbers for the same shape."""
    import torch

    generator = torch.Generator(device).manual_seed(math.prod(shape))
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)
