"""Packed batches through the Triton kernels: every sequence as if it stood alone, empty and tiny ones among them."""

from dataclasses import replace

import pytest
import torch

from nsa_kernels import NativeSparseAttention, Packing, Variant, dispatch, gpu, reference

SMALL = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=3, window=12)
VARIANTS = {
    "paper": SMALL,
    "no-window": replace(SMALL, window=0),
    "no-overlap": Variant(16, 16, 16, 3, 0, 1, 16),
    "all-blocks": replace(SMALL, select_count=9),  # cover the batch: dense attention
    "streamed": Variant(16, 16, 16, 4, 0, 1, 20, topk="streamed", topk_chunk=2),
}
LENGTHS = [29, 0, 5, 40, 1, 17]  # none, fewer than a compression block, one token
CASES = {f"{name}-G3": (variant, LENGTHS, (6, 2)) for name, variant in VARIANTS.items()}
CASES |= {f"{name}-G16": (VARIANTS[name], [19, 0, 2, 33, 1], (16, 1)) for name in ("paper", "streamed")}


def inputs(lengths: list[int], heads: tuple[int, int], device: str, D: int = 16, DV: int = 24) -> dict:
    g, T, (HQ, HKV) = torch.Generator().manual_seed(sum(lengths)), sum(lengths), heads
    shapes = dict(q=(T, HQ, D), k=(T, HKV, D), v=(T, HKV, DV), q_cmp=(T, HQ, D), k_swa=(T, HKV, D), v_swa=(T, HKV, DV))
    x = {name: torch.randn(*shape, generator=g).to(device) for name, shape in shapes.items()}
    return x | dict(gates=torch.rand(T, HQ, 3, generator=g).to(device))


def packing_of(lengths: list[int], variant: Variant, device: str) -> Packing:
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Packing(bounds, sum(lengths), variant)


@pytest.mark.parametrize(("variant", "lengths", "heads"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_each_alone(device, variant: Variant, lengths, heads) -> None:
    packing, x = packing_of(lengths, variant, device), inputs(lengths, heads, device)
    ours = {name: t.clone().requires_grad_() for name, t in x.items()}
    exact = {name: t.double().requires_grad_() for name, t in x.items()}
    compressed = {f"{n}_cmp": gpu.compress(ours[n], variant, packing=packing) for n in ("k", "v")}
    o, chosen = gpu.nsa_attention(**ours, **compressed, variant=variant, packing=packing)
    parts = []
    for part in zip(*(t.split(lengths) for t in exact.values()), strict=True):
        one = dict(zip(exact, part, strict=True))
        one |= {f"{n}_cmp": reference.compress(one[n], variant) for n in ("k", "v")}
        parts.append(reference.nsa_attention(**one, variant=variant))
    truth, expected = (torch.cat(found) for found in zip(*parts, strict=True))
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(o.double(), truth, atol=1e-5, rtol=1e-5)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(device)
    o.backward(weight)
    truth.backward(weight.double())
    for name, t in ours.items():
        if variant.window or not name.endswith("_swa"):
            torch.testing.assert_close(t.grad.double(), exact[name].grad, atol=5e-5, rtol=1e-4)


def test_rows_of_no_sequence_are_never_read(device) -> None:
    """Compressed keys after the last sequence's, which the host cannot cut off, may hold anything."""
    lengths = [9, 3, 21]
    packing, x = packing_of(lengths, SMALL, device), inputs(lengths, (3, 1), device)
    compressed = {f"{n}_cmp": gpu.compress(x[n], SMALL, packing=packing) for n in ("k", "v")}
    rows = sum(SMALL.compressed_count(length) for length in lengths)
    assert rows < compressed["k_cmp"].shape[0]
    o, chosen = gpu.nsa_attention(**x, **compressed, variant=SMALL, packing=packing)
    for t in compressed.values():
        t[rows:] = torch.nan
    poisoned, again = gpu.nsa_attention(**x, **compressed, variant=SMALL, packing=packing)
    assert torch.equal(o, poisoned) and torch.equal(chosen, again)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [3, 3, 3, 3], [16, 16, 32], [0, 70, 0]], ids=str)
def test_odd_batches(device, lengths: list[int]) -> None:
    packing, x = packing_of(lengths, SMALL, device), inputs(lengths, (3, 1), device)
    compressed = {f"{n}_cmp": gpu.compress(x[n], SMALL, packing=packing) for n in ("k", "v")}
    o, chosen = gpu.nsa_attention(**x, **compressed, variant=SMALL, packing=packing)
    truth, expected = dispatch.nsa_attention(
        **{n: t.double() for n, t in (x | compressed).items()}, variant=SMALL, packing=packing
    )
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(o.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(compress_rope="after"), dict(compress_rope="none", branch_kv=False)])
def test_a_layer_in_triton_is_the_layer(device, monkeypatch, options: dict) -> None:
    """With positions within each sequence; once for the whole batch, once for each sequence."""
    torch.manual_seed(0)
    layer = NativeSparseAttention(24, 6, 2, head_dim=16, variant=SMALL, device=device, **options)
    x = torch.randn(sum(LENGTHS), 24, device=device)
    alone = [layer(part[None])[0] for part in x.split(LENGTHS)]
    calls = []
    monkeypatch.setattr(dispatch, "_implementation", lambda *_: calls.append(1) or gpu)
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0)
    torch.testing.assert_close(layer(x, bounds), torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert len(calls) == 1


def test_another_number_of_tokens_is_refused(device) -> None:
    x = inputs([9], (3, 1), device)
    compressed = {f"{n}_cmp": gpu.compress(x[n], SMALL) for n in ("k", "v")}
    with pytest.raises(ValueError, match="8 queries and keys"):
        dispatch.nsa_attention(**x, **compressed, variant=SMALL, packing=packing_of([8], SMALL, device))


@pytest.mark.parametrize("lengths", [LENGTHS, [], [5]], ids=str)
def test_tables(lengths: list[int]) -> None:
    """Against a loop over the sequences."""
    packing = packing_of(lengths, SMALL, "cpu")
    keys, key_ends, blocks, block_ends, block_keys, first = [], [], [], [], [], 0
    for length in lengths:
        here = len(keys)
        starts = range(0, length - SMALL.compress_block + 1, SMALL.compress_stride)
        keys += [first + start for start in starts]
        key_ends += [first + length] * len(starts)
        starts = range(0, length, SMALL.select_block)
        blocks += [first + start for start in starts]
        block_keys += [here + start // SMALL.compress_stride for start in starts]
        block_ends += [first + length] * len(starts)
        first += length
    for table, expected in (
        (packing.key_token, keys),
        (packing.compressed.end, key_ends),
        (packing.spans[0], blocks),
        (packing.spans[1], block_ends),
        (packing.block_key, block_keys),
    ):
        assert table.dtype == torch.int32 and table[: len(expected)].tolist() == expected
    for table in (packing.key_token, packing.compressed.end, packing.spans[0]):  # what is left over sees no query
        assert (table[len(keys if table is not packing.spans[0] else blocks) :] >= first).all()
