"""The choice of blocks against the reference's scores: near ties may fall either way, so scores are compared."""

from dataclasses import replace

import pytest
import torch

from nsa_kernels import Variant, ranged, reference, select

SMALL = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=5, window=24)
VARIANTS = {
    "paper": SMALL,
    "literal": replace(SMALL, importance_map="literal"),
    "fla": Variant(16, 16, 16, 4, 1, 2, 16),
    "nothing-forced-first": replace(SMALL, initial_blocks=0, local_blocks=1, select_count=3),
    "only-forced": replace(SMALL, select_count=3),
    "many": replace(SMALL, select_count=17),
    "streamed": Variant(16, 16, 16, 4, 0, 1, 32, topk="streamed", topk_chunk=3),
}


def case(T: int, offset: int, heads: tuple[int, int], variant: Variant, device: str, D: int = 32, dtype=torch.float32):
    g = torch.Generator().manual_seed(T)
    (HQ, HKV), NC = heads, variant.compressed_count(offset + T)
    q, k = torch.randn(T, HQ, D, generator=g), torch.randn(NC, HKV, D, generator=g)
    return q.to(device, dtype), k.to(device, dtype)


def check(q, k, variant: Variant, offset: int) -> None:
    """The scores of the chosen blocks are the best ones, forced blocks among them, in ascending order."""
    T, HKV = q.shape[0], k.shape[1]
    _, lse = ranged.attention(q, k, k, offset=offset, block=variant.compress_block, stride=variant.compress_stride)
    got = select.select_blocks(q, k, lse, variant, offset=offset)
    _, p = reference.compressed_attention(q.double(), k.double(), k.double(), variant, offset)
    importance = reference.block_importance(p, HKV, variant, variant.block_count(offset + T))
    expected = reference.select_blocks(importance, variant, offset)
    assert got.dtype == torch.int32 and got.shape == expected.shape
    assert torch.equal(got < 0, expected < 0)
    order = got.masked_fill(got < 0, 1 << 30)
    assert (order.diff(dim=-1) > 0)[got[..., 1:] >= 0].all(), "ascending, none twice"
    scores = [
        importance.gather(2, x.long().clamp(min=0)).masked_fill(x < 0, 0).sort(-1).values for x in (got, expected)
    ]
    torch.testing.assert_close(*scores, atol=2e-3 if q.dtype == torch.float16 else 1e-6, rtol=1e-3)
    if q.dtype == torch.float32:
        assert (got == expected).float().mean() > 0.98


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("T", "offset"), [(75, 0), (20, 101), (1, 130)])
def test_every_rule_at_odd_sizes(device, T: int, offset: int, variant: Variant) -> None:
    check(*case(T, offset, (4, 2), variant, device), variant, offset)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (7, 1), (16, 1), (9, 3)], ids=str)
def test_groups_of_any_size(device, heads: tuple[int, int]) -> None:
    check(*case(40, 60, heads, SMALL, device), SMALL, 60)


@pytest.mark.parametrize("D", [64, 80, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_widths_and_half_precision(device, D: int, dtype: torch.dtype) -> None:
    check(*case(30, 50, (4, 2), SMALL, device, D, dtype), SMALL, 50)
