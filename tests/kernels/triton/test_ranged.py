"""One kernel, three branches: dense, window and compressed attention against the reference in float64."""

import pytest
import torch

from nsa_kernels import Variant, ranged, reference

GROUPS = [(1, 1), (2, 2), (3, 3), (8, 2), (7, 1), (16, 1)]  # query heads, key heads
WIDTHS = [(32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (24, 40)]
BRANCHES = {
    "dense": {},
    "window": dict(window=9),
    "compressed": dict(block=8, stride=4),
    "blocks": dict(block=5, stride=5),
}


def inputs(T: int, S: int, heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, device: str):
    g = torch.Generator().manual_seed(T * 1000 + S)
    (HQ, HKV), (D, DV) = heads, widths
    shapes = (T, HQ, D), (S, HKV, D), (S, HKV, DV)
    return [torch.randn(*shape, generator=g).to(device, dtype) for shape in shapes]


def truth(q, k, v, branch: dict, offset: int) -> torch.Tensor:
    """The same in float64, by the reference."""
    q, k, v = (x.double() for x in (q, k, v))
    if "block" in branch:
        variant = Variant(branch["block"], branch["stride"], branch["block"] * branch["stride"])
        return reference.compressed_attention(q, k, v, variant, offset)[0]
    if "window" in branch:
        return reference.window_attention(q, k, v, Variant(window=branch["window"]), offset)
    return reference.dense_attention(q, k, v, offset=offset)


def keys_of(branch: dict, tokens: int) -> int:
    if "block" not in branch:
        return tokens
    return max(0, (tokens - branch["block"]) // branch["stride"] + 1)


def agree(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within twice what rounding the inputs' products to their dtype costs."""
    limit = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, atol=limit * max(1, float(expected.abs().max())), rtol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize(("T", "offset"), [(37, 0), (1, 40), (21, 30)])
def test_every_branch_at_odd_sizes(device, T: int, offset: int, branch: dict, dtype: torch.dtype) -> None:
    q, k, v = inputs(T, keys_of(branch, offset + T), (6, 2), (32, 32), dtype, device)
    o, _ = ranged.attention(q, k, v, offset=offset, **branch)
    agree(o, truth(q, k, v, branch, offset), dtype)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_groups_of_any_size(device, heads: tuple[int, int]) -> None:
    q, k, v = inputs(19, 19, heads, (32, 32), torch.float32, device)
    o, _ = ranged.attention(q, k, v)
    agree(o, truth(q, k, v, {}, 0), torch.float32)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("branch", ["dense", "compressed"])
def test_heads_of_any_width(device, widths: tuple[int, int], branch: str) -> None:
    kind = BRANCHES[branch]
    q, k, v = inputs(23, keys_of(kind, 23), (4, 2), widths, torch.float32, device)
    o, _ = ranged.attention(q, k, v, **kind)
    agree(o, truth(q, k, v, kind, 0), torch.float32)


def test_views_of_a_cache_and_what_lies_behind_it(device) -> None:
    """Keys as a cache gives them, (HKV, capacity, D) transposed; the part that is not filled is poison."""
    q, k, v = inputs(9, 40, (6, 2), (32, 32), torch.float32, device)
    cache = [torch.full((2, 50, 32), torch.nan, device=device) for _ in range(2)]
    for buffer, x in zip(cache, (k, v), strict=True):
        buffer[:, :40] = x.transpose(0, 1)
    o, _ = ranged.attention(q, *(b[:, :40].transpose(0, 1) for b in cache), offset=31)
    agree(o, truth(q, k, v, {}, 31), torch.float32)


def test_queries_that_see_no_key_are_zero(device) -> None:
    q, k, v = inputs(12, 2, (3, 1), (32, 32), torch.float32, device)
    o, lse = ranged.attention(q, k, v, block=8, stride=4)
    assert (o[:7] == 0).all() and (lse[:, :21] == -torch.inf).all()
    assert (o[7:] != 0).any() and lse[:, 21:].isfinite().all()
    nothing, _ = ranged.attention(q[:5], k[:0], v[:0], block=8, stride=4)
    assert (nothing == 0).all()


def test_lse_is_that_of_the_scores(device) -> None:
    q, k, v = inputs(13, 13, (4, 2), (32, 32), torch.float32, device)
    _, lse = ranged.attention(q, k, v)
    scores = torch.einsum("thd,shd->ths", q.double(), k.double().repeat_interleave(2, 1)) * 32**-0.5
    scores = scores.masked_fill(torch.arange(13) > torch.arange(13)[:, None, None], -torch.inf)
    expected = scores.logsumexp(-1).view(13, 2, 2).transpose(0, 1).reshape(2, 26) / torch.tensor(2.0).log()
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize(("T", "offset", "heads", "widths"), [(37, 0, (6, 2), (32, 32)), (18, 20, (3, 1), (24, 40))])
def test_gradients_are_those_of_the_reference(device, T, offset, heads, widths, branch: dict) -> None:
    q, k, v = inputs(T, keys_of(branch, offset + T), heads, widths, torch.float32, device)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    ours = [x.requires_grad_() for x in (q, k, v)]
    out = ranged.attention(*ours, offset=offset, **branch)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(device)
    out.backward(weight)
    truth(*exact, branch, offset).backward(weight.double())
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=2e-5, rtol=1e-4)
