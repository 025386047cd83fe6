"""The paper's overlapping variant against values computed by code that is not ours."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nsa_kernels import Variant, cpu, native, reference

ORACLE = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "paper_variant.safetensors"
VARIANT = Variant(select_count=6)


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    if not ORACLE.exists():
        pytest.skip("no oracle files beside the checkout (../shared/oracles)")
    return load_file(ORACLE)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def branch(path, oracle: dict, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k_cmp, v_cmp, one branch's output alone (by its gate) and the chosen blocks."""
    compress = (cpu if path is native else path).compress
    k_cmp = compress(oracle["k"], VARIANT, oracle["compress_key"], oracle["intra_block_pe"])
    v_cmp = compress(oracle["v"], VARIANT, oracle["compress_value"])
    gates = torch.zeros(500, 16, 3)
    gates[..., number] = 1
    o, blocks = path.nsa_attention(oracle["q"], oracle["k"], oracle["v"], k_cmp, v_cmp, gates, VARIANT)
    return k_cmp, v_cmp, o, blocks


def sliding(oracle: dict) -> torch.Tensor:
    """The window branch by PyTorch's own attention: the last 512 of 500 tokens are all of them."""
    q, k, v = (oracle[n].transpose(0, 1) for n in ("q", "k", "v"))
    k, v = (x.repeat_interleave(4, 0) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@pytest.mark.parametrize("path", [reference, cpu, native], ids=["reference", "cpu", "native"])
def test_paper_variant(path, oracle) -> None:
    if path is native and not native.supports(oracle["q"]):
        pytest.skip("no C compiler")
    k_cmp, v_cmp, o_cmp, blocks = branch(path, oracle, 0)
    assert relative(k_cmp, oracle["k_cmp"]) < 1e-4
    assert relative(v_cmp, oracle["v_cmp"]) < 1e-4
    assert relative(o_cmp, oracle["o_cmp"]) < 1e-4
    assert relative(branch(path, oracle, 1)[2], oracle["o_slc"]) < 1e-4
    assert relative(branch(path, oracle, 2)[2], sliding(oracle)) < 1e-4
    assert torch.equal(blocks.sort(-1).values, oracle["block_indices"].int().sort(-1).values)
