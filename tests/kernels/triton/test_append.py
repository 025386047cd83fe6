"""One token into the caches, in the interpreter: what it writes, and that it writes nothing else."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.append import append, compress_newest
from nsa_kernels.variant import Variant

VARIANT = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=4, window=24)
NAN = float("nan")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(positions: int, width: int, magnitude: float = 1.1) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 10.0 ** -torch.arange(width // 2)
    return angle.cos() * magnitude, angle.sin() * magnitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (..., D); cos, sin: (..., D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("heads", [(1, 1, 8, 8), (2, 3, 16, 16), (1, 4, 24, 10), (2, 16, 6, 16)], ids=str)
@pytest.mark.parametrize("rotated", [True, False])
def test_a_token_is_rotated_and_written(heads: tuple[int, ...], rotated: bool) -> None:
    HKV, G, D, Dv = heads
    lengths = torch.tensor([5, 0, 20], dtype=torch.int32)
    q, k, v = random(3, HKV * G, D, seed=1), random(3, HKV, D, seed=2), random(3, HKV, Dv, seed=3)
    k_cache = torch.full((3, 20, HKV, D), NAN).transpose(1, 2)
    v_cache = torch.full((3, HKV, 20, Dv), NAN)
    cos, sin = rotation(20, D) if rotated else (None, None)
    out = append(q, k, v, k_cache, v_cache, lengths, cos, sin)
    for b, length in ((0, 5), (2, 20)):
        at = length - 1
        turn = (lambda x, at=at: rotate(x, cos[at], sin[at])) if rotated else (lambda x: x)
        assert torch.allclose(out[b], turn(q[b]), atol=1e-6)
        assert torch.allclose(k_cache[b, :, at], turn(k[b]), atol=1e-6)
        assert torch.equal(v_cache[b, :, at], v[b])
        k_cache[b, :, at], v_cache[b, :, at] = NAN, NAN
    assert k_cache.isnan().all() and v_cache.isnan().all()


def parameters(kind: str, HKV: int, D: int, Do: int):
    l, F = VARIANT.compress_block, 2 * D + 1
    if kind == "mean":
        return None
    if kind == "linear":
        return random(HKV, l * D, Do, seed=5) / (l * D) ** 0.5
    if kind == "softmax":
        return random(HKV, D, seed=5), random(HKV, l, seed=6), random(HKV, D, Do, seed=7) / D**0.5
    up, down = random(HKV, l * D, F, seed=6) / (l * D) ** 0.5, random(HKV, F, Do, seed=8) / F**0.5
    return up, random(HKV, F, seed=7), down, random(HKV, Do, seed=9)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp", "softmax"])
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("place", ["before", "after", "undone", "undone, after"])
def test_the_newest_block_is_what_a_prefill_compresses(kind: str, position: bool, place: str) -> None:
    HKV, D, capacity = 2, 12, 40
    Do = D if kind == "mean" else 14
    lengths = torch.tensor([7, 8, 9, 36, 0], dtype=torch.int32)  # only 8 and 36 complete a block
    x = random(5, HKV, capacity, D, seed=1)
    phi, offsets = parameters(kind, HKV, D, Do), random(HKV, 8, D, seed=2) if position else None
    cos, sin = rotation(capacity, D)
    cached = rotate(x, cos, sin) if "undone" in place else x.clone()
    for b, length in enumerate(lengths.tolist()):
        cached[b, :, length:] = NAN
    x_cmp = torch.full((5, HKV, VARIANT.compressed_count(capacity), Do), NAN)
    out_angles = rotation(capacity, Do)
    compress_newest(
        cached, x_cmp, lengths, VARIANT, phi, offsets,
        undo=(cos, sin) if "undone" in place else None, rotate=out_angles if "after" in place else None,
    )  # fmt: skip
    for b, length, block in ((1, 8, 0), (3, 36, 7)):
        double = tuple(p.double() for p in phi) if isinstance(phi, tuple) else None if phi is None else phi.double()
        at = None if offsets is None else offsets.double()
        true = reference.compress(x[b, :, :length].transpose(0, 1).double(), VARIANT, double, at)[-1]
        if "after" in place:
            true = rotate(true, *(angle[4 * block].double() for angle in out_angles))
        assert float((x_cmp[b, :, block] - true).abs().max()) < 5e-6
        x_cmp[b, :, block] = NAN
    assert x_cmp.isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    q, k, cache = torch.zeros(1, 2, 7), torch.zeros(1, 1, 7), torch.zeros(1, 1, 9, 7)
    lengths = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="does not fit heads of 7"):
        append(q, k, k, cache, cache, lengths, *rotation(9, 6))
    with pytest.raises(ValueError, match="do not fit k and v"):
        append(q, k, k, cache, cache.transpose(2, 3), lengths)
