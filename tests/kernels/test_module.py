"""The layer that people train: its example, causality, packing, and that our checkpoints can take its weights."""

import inspect
import textwrap

import pytest
import torch

from nsa_kernels import NativeSparseAttention, Variant
from nsa_models import NSAConfig
from nsa_models.attention import Attention
from nsa_models.cache import Cache
from nsa_models.rope import Rope

SMALL = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=4, window=16)
KINDS = [
    dict(compression=c, branch_kv=b, compress_rope=r)
    for c in ("mlp", "linear", "softmax", "mean")
    for b in (True, False)
    for r in ("before", "after", "none")
]


def layer(**options) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(24, 4, 2, **{"variant": SMALL, "dtype": torch.float64} | options)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_example_learns():
    example = inspect.getdoc(NativeSparseAttention).split("\n\n    import torch\n")[1].split("\n\ndim:")[0]
    names: dict = {}
    exec("import torch\n" + textwrap.dedent("    " + example.lstrip()), names)  # noqa: S102
    first, last = (sum(part) / 20 for part in (names["losses"][:20], names["losses"][-20:]))
    assert first > 1.5  # guessing one of eight costs log 8 = 2.1
    assert last < 0.5


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_it_is_the_same_layer_as_our_models(options):
    """Same parameter names and shapes, and with the same weights the same result as a model's layer."""
    ours = layer(**options, positions=True, head_dim=8, v_head_dim=6)
    config = NSAConfig(
        vocab_size=8, hidden_size=24, num_hidden_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=6,
        intermediate_size=8, gate_bias=True, compress_kind=options["compression"], compress_positions=True,
        branch_kv=options["branch_kv"], compress_rope=options["compress_rope"], compress_block=8, compress_stride=4,
        select_block=16, select_count=4, window=16,
    )  # fmt: skip
    theirs = Attention(config, 0, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        for p in (p for name, p in ours.named_parameters() if "compress" in name):
            p += 0.1 * torch.randn_like(p)  # softmax weights start equal
    theirs.load_state_dict(ours.state_dict())
    x, T = inputs(75, 24), 75
    cache, rope = Cache(config, T, dtype=torch.float64), Rope(config)
    cos, sin = rope.angles(torch.arange(T), torch.float64)
    q, q_cmp, gates = theirs.empty_queries(x)
    theirs.project(x, cos, sin, cache, 0, q, q_cmp, gates)
    theirs.compress(rope, cache, T, torch.float64)
    expected = theirs.o_proj(theirs.attend(q, q_cmp, gates, cache).flatten(1))
    with torch.no_grad():
        assert torch.allclose(ours(x[None])[0], expected, atol=1e-9)


def test_packed_is_batched_is_alone():
    attention, x = layer(), inputs(2, 40, 24)
    alone = torch.stack([attention(x[i : i + 1])[0] for i in range(2)])
    assert torch.allclose(attention(x), alone, atol=1e-12)
    bounds = torch.tensor([0, 40, 40, 80], dtype=torch.int32)
    assert torch.allclose(attention(x.flatten(0, 1), bounds).view(x.shape), alone, atol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(branch_kv=False, compress_rope="none"), dict(rope_theta=None)], ids=str)
def test_later_tokens_change_nothing_earlier(options):
    attention, x = layer(**options), inputs(1, 70, 24).requires_grad_()
    attention(x)[0, 50].sum().backward()
    assert x.grad[0, :51].abs().sum(-1).gt(0).sum() > 16  # more than the window
    assert not x.grad[0, 51:].any()


def test_softmax_weights_start_as_the_mean():
    softmax, mean = (layer(compression=kind, positions=False) for kind in ("softmax", "mean"))
    mean.load_state_dict({k: v for k, v in softmax.state_dict().items() if "compress" not in k})
    assert torch.allclose(softmax(inputs(2, 60, 24)), mean(inputs(2, 60, 24)), atol=1e-12)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_parameter_has_a_gradient(options):
    attention = layer(**options)
    attention(inputs(2, 60, 24)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_short_and_empty_inputs():
    attention = layer()
    assert attention(inputs(1, 3, 24)).shape == (1, 3, 24)
    assert attention(inputs(0, 24), torch.tensor([0, 0])).shape == (0, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=5, num_kv_heads=2), "multiple of num_kv_heads"),
        (dict(num_heads=5), "give head_dim"),
        (dict(num_heads=4, head_dim=7), "even head_dim"),
        (dict(num_heads=4, compression="max"), "compression must be"),
        (dict(num_heads=4, compress_rope="during"), "compress_rope must be"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(24, **options)


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 24\)"):
        layer()(inputs(3, 24))
    with pytest.raises(ValueError, match="ascend from 0 to 3"):
        layer()(inputs(3, 24), torch.tensor([0, 2]))
