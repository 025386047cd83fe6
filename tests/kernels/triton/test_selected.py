"""The selected branch against the reference in float64, forward and backward."""

import pytest
import torch

from nsa_kernels import Variant, reference, selected


def choices(T: int, HKV: int, n: int, block: int, offset: int) -> torch.Tensor:
    """Random distinct blocks among those a query may see, its own always, -1 at the end."""
    g = torch.Generator().manual_seed(T)
    chosen = torch.full((T, HKV, n), -1, dtype=torch.int32)
    for t in range(T):
        current = (offset + t) // block
        for h in range(HKV):
            others = torch.randperm(current, generator=g)[: n - 1]
            found = torch.cat([others, torch.tensor([current])]).sort().values
            chosen[t, h, : len(found)] = found.int()
    return chosen


def case(T, offset, heads, widths, block, n, dtype, device):
    g = torch.Generator().manual_seed(T + offset)
    (HQ, HKV), (D, DV), S = heads, widths, offset + T
    shapes = (T, HQ, D), (S, HKV, D), (S, HKV, DV)
    q, k, v = (torch.randn(*shape, generator=g).to(device, dtype) for shape in shapes)
    return q, k, v, choices(T, HKV, n, block, offset).to(device)


CASES = {
    "G3": (45, 0, (6, 2), (32, 32), 16, 3),
    "chunk": (20, 61, (6, 2), (32, 32), 16, 3),
    "one": (1, 70, (4, 1), (64, 64), 16, 4),
    "G1": (25, 10, (2, 2), (32, 32), 16, 2),
    "G7": (18, 10, (7, 1), (32, 32), 16, 2),
    "G16": (18, 40, (16, 1), (32, 32), 16, 3),
    "G20": (18, 0, (20, 1), (32, 32), 16, 2),
    "odd-block": (37, 0, (2, 1), (32, 32), 24, 2),
    "wide-block": (20, 150, (2, 1), (32, 32), 128, 2),
    "widths": (24, 0, (4, 2), (80, 40), 16, 2),
    "192-128": (10, 20, (4, 2), (192, 128), 16, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_forward_and_backward(device, shape: tuple, dtype: torch.dtype) -> None:
    q, k, v, chosen = case(*shape, dtype, device)
    block, offset = shape[4], shape[1]
    variant = Variant(block, block, block, chosen.shape[2], 0, 1)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    ours = [x.requires_grad_() for x in (q, k, v)]
    truth = reference.selected_attention(*exact, chosen, variant, offset)
    got = selected.attention(*ours, chosen, block, offset=offset)
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)).to(device)
    got.backward(weight.to(dtype))
    truth.backward(weight.to(dtype).double())
    limit = 2e-5 if dtype == torch.float32 else 6e-3
    torch.testing.assert_close(got.double(), truth, atol=limit, rtol=limit)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=limit * max(1, float(y.grad.abs().max())), rtol=limit)


def test_choosers_list_every_choice_once() -> None:
    chosen = choices(200, 3, 4, 8, 20)
    found = selected.Choosers.of(chosen, 28)
    lists = [{b: [] for b in range(28)} for _ in range(3)]
    for h in range(3):
        for piece, (block, begin, end) in enumerate(found.pieces[h].tolist()):
            assert end - begin <= 64  # of 200 that chose the first block
            entries = found.entries[begin:end]
            assert (chosen[entries // 4, h, entries % 4] == block).all()
            lists[h][block] += (entries // 4).tolist()
            if begin < end:
                assert found.starts[h, block] <= piece < found.starts[h, block + 1]
        for block, queries in lists[h].items():
            assert queries == (chosen[:, h] == block).any(-1).nonzero().flatten().tolist()


def test_queries_in_several_chunks(device, monkeypatch) -> None:
    q, k, v, chosen = case(20, 61, (6, 2), (32, 32), 16, 3, torch.float32, device)
    whole = selected.attention(q, k, v, chosen, 16, offset=61)
    monkeypatch.setattr(selected, "PARTIAL_BYTES", 7 * 6 * 3 * 32 * 4)  # seven queries
    torch.testing.assert_close(selected.attention(q, k, v, chosen, 16, offset=61), whole)
