"""All branches together: the reference in float64, values of other people's code, and the seam."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa_kernels import Variant, dispatch, gpu, reference

SMALL = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=4, window=24)
VARIANTS = {
    "paper": SMALL,
    "fla": Variant(16, 16, 16, 4, 0, 1, 16),
    "no-window": replace(SMALL, window=0),
    "all-blocks": replace(SMALL, select_count=7),  # cover any context of up to 112 tokens: dense attention
    "streamed": Variant(16, 16, 16, 4, 0, 1, 32, topk="streamed", topk_chunk=3),
}
ORACLES = Path(__file__).resolve().parents[4] / "shared" / "oracles"


def case(T: int, offset: int, variant: Variant, device: str, own: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(T)
    S, HQ, HKV, D, DV = offset + T, 6, 2, 32, 24
    NC = variant.compressed_count(S)
    shapes = dict(q=(T, HQ, D), k=(S, HKV, D), v=(S, HKV, DV), k_cmp=(NC, HKV, D), v_cmp=(NC, HKV, DV))
    if own:
        shapes |= dict(q_cmp=(T, HQ, D), k_swa=(S, HKV, D), v_swa=(S, HKV, DV))
    x = {name: torch.randn(*shape, generator=g).to(device) for name, shape in shapes.items()}
    return x | dict(gates=torch.rand(T, HQ, 3, generator=g).to(device))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-keys"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("T", "offset"), [(45, 0), (13, 90)])
def test_values_and_gradients(device, T: int, offset: int, variant: Variant, own: bool) -> None:
    ours = {name: x.requires_grad_() for name, x in case(T, offset, variant, device, own).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in ours.items()}
    o, chosen = gpu.nsa_attention(**ours, variant=variant, offset=offset)
    truth, expected = reference.nsa_attention(**exact, variant=variant, offset=offset)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(o.double(), truth, atol=1e-5, rtol=1e-5)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(device)
    o.backward(weight)
    truth.backward(weight.double())
    for name, x in ours.items():
        if variant.window or not name.endswith("_swa"):
            torch.testing.assert_close(x.grad.double(), exact[name].grad, atol=5e-5, rtol=1e-4)


def test_chunks_and_single_tokens_are_parts_of_the_whole(device) -> None:
    x = case(50, 0, SMALL, device)
    whole, blocks = gpu.nsa_attention(**x, variant=SMALL)
    for start, stop in ((0, 30), (30, 49), (49, 50)):
        part = {n: t[start:stop] if n in ("q", "gates") else t for n, t in x.items()}
        o, chosen = gpu.nsa_attention(**part, variant=SMALL, offset=start)
        torch.testing.assert_close(o, whole[start:stop], atol=2e-6, rtol=1e-5)
        assert torch.equal(chosen, blocks[start:stop])


def test_the_papers_variant_by_other_peoples_code(device) -> None:
    from safetensors.torch import load_file

    path = ORACLES / "paper_variant.safetensors"
    if not path.exists():
        pytest.skip("no oracle files beside the checkout (../shared/oracles)")
    oracle = {name: x.to(device) for name, x in load_file(path).items()}
    variant = Variant(select_count=6)
    k_cmp = gpu.compress(oracle["k"], variant, oracle["compress_key"], oracle["intra_block_pe"])
    v_cmp = gpu.compress(oracle["v"], variant, oracle["compress_value"])
    results = {}
    last = slice(450, 500)  # of the queries: the interpreter takes a minute for all
    for number, name in enumerate(("o_cmp", "o_slc")):
        gates = torch.zeros(50, 16, 3, device=device)
        gates[..., number] = 1
        results[name], chosen = gpu.nsa_attention(
            oracle["q"][last], oracle["k"], oracle["v"], k_cmp, v_cmp, gates, replace(variant, window=0), offset=450
        )
    for name, got in dict(k_cmp=k_cmp, v_cmp=v_cmp).items():
        assert (got - oracle[name]).abs().max() < 1e-4 * oracle[name].abs().max()
    for name, got in results.items():
        assert (got - oracle[name][last]).abs().max() < 1e-4 * oracle[name].abs().max(), name
    assert torch.equal(chosen.sort(-1).values, oracle["block_indices"][last].int().sort(-1).values)


def test_fla_checkpoint_gives_flas_logits(device, monkeypatch) -> None:
    from safetensors.torch import load_file

    from nsa_models import load_model

    if not (ORACLES / "fla_nsa_tiny").exists():
        pytest.skip("no oracle files beside the checkout (../shared/oracles)")
    monkeypatch.setattr(dispatch, "_implementation", lambda *_: gpu)
    expected = load_file(ORACLES / "fla_nsa_tiny" / "expected.safetensors")
    model = load_model(ORACLES / "fla_nsa_tiny", device, torch.float32)
    logits = model(expected["input_ids"].long().to(device)[:100])
    assert (logits.cpu() - expected["logits"][:100]).abs().max() < 1e-4 * expected["logits"].abs().max()


def test_the_tensor_decides() -> None:
    class OnGPU:
        dtype, is_cuda = torch.bfloat16, True

    assert dispatch._implementation(OnGPU()) is gpu
    assert dispatch._implementation(torch.zeros(1, dtype=torch.float64)) is reference
