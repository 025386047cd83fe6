"""Our dense Triton attention against float64, forward and backward, in the interpreter."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.flash import flash_attention
from nsa_kernels.tiles import split_width

SHAPES = [  # T, HKV, G, D, Dv, offset, later keys
    (1, 1, 1, 32, 32, 0, 0),
    (40, 1, 1, 32, 32, 0, 0),
    (63, 2, 3, 64, 64, 0, 0),
    (33, 1, 2, 192, 128, 0, 0),
    (50, 1, 4, 40, 24, 17, 5),
    (35, 2, 7, 16, 16, 64, 0),
    (47, 1, 16, 96, 32, 3, 40),
]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(x: Tensor, truth: Tensor) -> float:
    assert x.isfinite().all(), "an element was not written"
    return float((x.double() - truth).abs().max())


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty starts as NaN: what no program writes stays NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [1, 16, 17, 32, 40, 64, 80, 96, 100, 128, 160, 192, 256])
def test_tiles_cover_a_head(width: int) -> None:
    first, second = split_width(width)
    assert width <= first + second <= max(16, 2 * width)
    assert all(x & (x - 1) == 0 for x in (first, second))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_and_gradients(shape, dtype: torch.dtype) -> None:
    T, HKV, G, D, Dv, offset, later = shape
    S = offset + T + later
    q, k, v = random(T, HKV * G, D, seed=1), random(S, HKV, D, seed=2), random(S, HKV, Dv, seed=3)
    do = random(T, HKV * G, Dv, seed=4)
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))

    def run(attention, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        o = attention(*leaves, offset=offset)
        o.backward(do.to(dtype))
        return [o.detach(), *(x.grad for x in leaves)]

    truth, torch_s = run(reference.dense_attention, torch.float64), run(reference.dense_attention, dtype)
    results = zip(["o", "dq", "dk", "dv"], run(flash_attention, dtype), torch_s, truth, strict=True)
    for name, ours, theirs, true in results:
        assert ours.dtype == dtype
        assert error(ours, true) <= 2 * error(theirs, true) + 2e-6, name


def test_large_scores_and_another_scale() -> None:
    q, k, v = random(45, 2, 32, seed=1) * 30, random(45, 1, 32, seed=2) * 30, random(45, 1, 32, seed=3)
    truth = reference.dense_attention(q.double(), k.double(), v.double(), scale=0.5)
    theirs = reference.dense_attention(q, k, v, scale=0.5)
    assert error(flash_attention(q, k, v, scale=0.5), truth) <= 2 * error(theirs, truth) + 1e-6


def test_a_transposed_cache_is_read_as_it_lies() -> None:
    k, v = random(2, 90, 32, seed=2).transpose(0, 1), random(2, 90, 32, seed=3).transpose(0, 1)
    q = random(4, 20, 32, seed=1).transpose(0, 1)
    truth = reference.dense_attention(q.double(), k.double(), v.double(), offset=61)
    assert error(flash_attention(q, k, v, offset=61), truth) < 1e-5


def test_what_lies_behind_the_last_query_is_not_read() -> None:
    q, k, v = random(20, 2, 32, seed=1), random(60, 1, 32, seed=2), random(60, 1, 32, seed=3)
    k[33:], v[33:] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = flash_attention(*leaves, offset=13)
    o.sum().backward()
    truth = reference.dense_attention(q.double(), k[:33].double(), v[:33].double(), offset=13)
    assert error(o.detach(), truth.detach()) < 1e-5
    assert q.grad.isfinite().all()
    assert not k.grad[33:].any() and not v.grad[33:].any()


def test_packed_sequences_do_not_see_each_other() -> None:
    lengths = [1, 37, 0, 32, 19]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    T = sum(lengths)
    packed = [random(T, H, D, seed=H).requires_grad_() for H, D in ((4, 48), (2, 48), (2, 32))]
    o = flash_attention(*packed, cu_seqlens=bounds)
    do = random(T, 4, 32, seed=9)
    o.backward(do)
    alone = [x.detach().double().requires_grad_() for x in packed]
    ends = zip(bounds[:-1], bounds[1:], strict=True)
    parts = [reference.dense_attention(*(x[a:b] for x in alone)) for a, b in ends if b > a]
    torch.cat(parts).backward(do.double())
    assert error(o.detach(), torch.cat(parts).detach()) < 1e-5
    for ours, true in zip(packed, alone, strict=True):
        assert error(ours.grad, true.grad) < 2e-5


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(4, 2, 16), torch.zeros(3, 2, 16)
    with pytest.raises(ValueError, match="3 keys for queries that end at 4"):
        flash_attention(q, k, k)
    with pytest.raises(ValueError, match="do not fit"):
        flash_attention(q, torch.zeros(4, 2, 8), torch.zeros(4, 2, 8))
    with pytest.raises(ValueError, match="scale must be positive"):
        flash_attention(q, q, q, scale=-1.0)
    with pytest.raises(ValueError, match="float64"):
        flash_attention(q.double(), q.double(), q.double())
