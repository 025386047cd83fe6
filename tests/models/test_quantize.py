"""int8 weights: how far they are from what they stand for, and that both ways of using them agree."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_models import NSAConfig
from nsa_models.linear import FEW_ROWS, Linear
from nsa_models.quantize import quantize, quantize_int8
from nsa_models.transformer import parameter_shapes


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    magnitude=st.floats(1e-8, 1e8),
    spread=st.floats(0, 4),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_error_is_at_most_half_a_step(rows, columns, magnitude, spread, seed, dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * magnitude * 10 ** (torch.rand(rows, 1, generator=g) * spread)
    weight = weight.to(dtype)
    packed, scale = quantize_int8(weight)
    assert packed.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (rows,)
    assert torch.equal(scale.bfloat16().float(), scale), "the kernel reads scales as bfloat16"
    assert packed.min() >= -127
    error = (packed.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    step = weight.double().abs().amax(1) / 127  # the scale is the smallest bfloat16 from there on
    assert (scale >= step * (1 - 1e-6)).all() and (scale <= step.clamp(min=1e-13) * (1 + 2**-7)).all()


def test_rows_of_zeros_stay_zero() -> None:
    packed, scale = quantize_int8(torch.zeros(3, 5))
    assert not packed.any() and (scale > 0).all()


@settings(max_examples=30, deadline=None)
@given(
    inside=st.sampled_from([16, 33, 64, 97, 100, 576]),
    outside=st.sampled_from([16, 48, 320]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_used_as_it_is_and_expanded_agree(inside: int, outside: int, bias: bool, seed: int) -> None:
    """Few rows run on int8, many on the expanded weight; inputs of 8 bits leave only the result's own rounding."""
    g = torch.Generator().manual_seed(seed)
    layer = Linear(inside, outside, bias)
    packed, scale = quantize_int8(torch.randn(outside, inside, generator=g))
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.weight_scale = scale
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(outside, generator=g), requires_grad=False)
    x = torch.randn(FEW_ROWS + 3, inside, generator=g).bfloat16().float()
    many = layer(x)
    exact = x.double() @ (packed.double() * scale.double()[:, None]).T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(many.double(), exact, atol=1e-4 * inside**0.5, rtol=1e-4)
    for rows in (1, FEW_ROWS):
        few = layer(x[:rows])
        assert few.dtype == torch.float32
        torch.testing.assert_close(few, many[:rows], atol=2e-3 * inside**0.5, rtol=1e-2)


@pytest.mark.parametrize("kind", ["mlp", "linear", "softmax"])
def test_wide_maps_are_quantized_and_sensitive_ones_kept(kind: str) -> None:
    config = NSAConfig(97, 32, 1, 4, 2, 8, 48, qkv_bias=True, gate_bias=True, branch_kv=True, compress_kind=kind)
    tensors = {name: torch.ones(shape) for name, shape in parameter_shapes(config).items()}
    packed = quantize(tensors)
    assert tensors.keys() < packed.keys()
    int8 = {name for name, tensor in packed.items() if tensor.dtype == torch.int8}
    at = "model.layers.0."
    assert int8 == {
        "model.embeddings.weight",
        "lm_head.weight",
        *(at + f"attn.{n}_proj.weight" for n in "qkvo"),
        *(at + f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }
    assert packed.keys() - tensors.keys() == {name + "_scale" for name in int8}
    for name in tensors.keys() - int8:
        assert packed[name] is tensors[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_int8_decodes_what_it_prefills(tmp_path, dtype) -> None:
    """A step of one token runs on int8, a prefill on expanded weights: the logits are those of one model."""
    from nsa_models import Cache, load_model, prefill
    from nsa_models.checkpoint import save_checkpoint

    config = NSAConfig(320, 64, 2, 4, 2, 16, 64, select_count=8, window=32)
    g = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=g) * 0.2 + ("norm" in n) for n, s in parameter_shapes(config).items()}
    save_checkpoint(tmp_path / "m", config, quantize(tensors))
    model = load_model(tmp_path / "m", "cpu", dtype)
    ids = torch.randint(0, 320, (60,), generator=g)
    whole = prefill(model, ids, Cache(config, 60, dtype=dtype))
    cache = Cache(config, 60, dtype=dtype)
    prefill(model, ids[:-1], cache)
    step = prefill(model, ids[-1:], cache)
    assert (step - whole).norm() / whole.norm() < 0.05


def test_int8_weights_are_floats_where_nothing_multiplies_them(tmp_path) -> None:
    """As on a GPU: the same values that a prefill on a CPU expands, and no scales left."""
    from nsa_models.checkpoint import _expand, load_model, save_checkpoint

    config = NSAConfig(320, 64, 1, 4, 2, 16, 64, tie_word_embeddings=True)
    g = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=g) for n, s in parameter_shapes(config).items()}
    save_checkpoint(tmp_path / "m", config, quantize(tensors))
    model = load_model(tmp_path / "m", "cpu", torch.float32)
    ids = torch.randint(0, 320, (20,), generator=g)
    expected = model(ids)
    _expand(model, torch.float32)
    torch.testing.assert_close(model(ids), expected)
    elsewhere = load_model(tmp_path / "m", "meta", torch.bfloat16)
    assert {p.dtype for p in elsewhere.parameters()} == {torch.bfloat16}
    assert all(getattr(m, "weight_scale", None) is None for m in elsewhere.modules())


MAPPED = """
import torch
from nsa_models.linear import FEW_ROWS, Linear, is_few

raw = torch.zeros(576 * 64 + 64, dtype=torch.int8)
for offset in (4, 8, 52):
    linear = Linear(576, 64, bias=False, dtype=torch.bfloat16)
    weight = raw[offset : offset + 576 * 64].view(64, 576).random_(-127, 128)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.weight_scale = torch.rand(64)
    for rows in range(1, 10):
        x = torch.randn(rows, 576).bfloat16()
        y = (x.double() @ (weight.double() * linear.weight_scale.double()[:, None]).T)
        assert (linear(x) - y).abs().max() < 0.02 * y.abs().max(), (offset, rows)
print(FEW_ROWS)
"""


def test_mapped_weights_may_lie_at_any_address():
    """In a process of its own: loads from weights that are not where the kernel wants them end it (signal 11)."""
    run = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "3\n"), run.stderr
