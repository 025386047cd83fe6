"""The training forward computes what inference computes, and its gradients are right."""

from dataclasses import replace

import pytest
import torch

from nsa_models.config import RopeScaling
from nsa_models.training.forward import hidden_states, output_logits
from nsa_models.training.student import fresh_weights
from nsa_models.transformer import NSAModel, parameter_shapes
from tests.models.tiny import CONFIG, random_model

CHUNKS = RopeScaling(4.0, 64, kind="dual_chunk", chunk=32)
VARIANTS = {
    "shared": {},
    "tied": dict(tie_word_embeddings=True, qkv_bias=True, v_head_dim=4),
    "paper": dict(branch_kv=True, compress_kind="mlp", compress_positions=True, compress_rope="none"),
    "linear": dict(compress_kind="linear", compress_rope="after"),
    "softmax": dict(compress_kind="softmax", v_head_dim=4),
    "softmax, after": dict(compress_kind="softmax", compress_positions=True, compress_rope="after"),
    "own keys, after": dict(branch_kv=True, compress_rope="after", compress_kind="mlp"),
    "own keys, before": dict(branch_kv=True, compress_rope="before", window=0),
    "scaled": dict(rope_scaling=RopeScaling(4.0, 64), compress_rope="after"),
    "chunks": dict(rope_scaling=CHUNKS),
    "chunks, after": dict(rope_scaling=CHUNKS, compress_rope="after", compress_kind="linear", compress_positions=True),
    "chunks, own keys": dict(rope_scaling=CHUNKS, branch_kv=True, compress_rope="before"),
}


def model(dtype=torch.float64, **changes) -> NSAModel:
    return random_model(replace(CONFIG, **changes), dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_inference_sequence_by_sequence(name):
    inference = model(**VARIANTS[name])
    lengths = [111, 7, 1, 130]
    ids = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    weights = inference.state_dict()
    hidden = hidden_states(inference.config, weights, ids, lengths, dtype=torch.float64)
    logits = output_logits(inference.config, weights, hidden).split(lengths)
    for sequence, got in zip(ids.split(lengths), logits, strict=True):
        torch.testing.assert_close(got, inference(sequence), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rope", ["before", "after", "none"])
def test_positions_are_scaled_as_in_a_longer_context(rope):
    """A sequence alone is computed as the beginning of one that fills the context."""
    from nsa_models import Cache

    inference = model(rope_scaling=RopeScaling(4.0, 64), compress_rope=rope)
    lengths = [120, 130]
    ids = torch.randint(97, (250,), generator=torch.Generator().manual_seed(1))
    weights = inference.state_dict()
    got = hidden_states(inference.config, weights, ids, lengths, context=200, dtype=torch.float64).split(lengths)
    for sequence, hidden in zip(ids.split(lengths), got, strict=True):
        expected = inference.advance(sequence, Cache(inference.config, 200, dtype=torch.float64))
        torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
    alone = hidden_states(inference.config, weights, ids, lengths, context=100, dtype=torch.float64).split(lengths)
    assert (alone[0] - got[0]).abs().max() > 1e-3, "the test would not see the difference"


def test_dense_is_inference_with_dense_attention():
    from nsa_models import Cache

    inference = model(select_count=3)
    ids = torch.randint(97, (140,), generator=torch.Generator().manual_seed(1))
    cache = Cache(inference.config, 140, dtype=torch.float64)
    expected = inference.advance(ids, cache, dense=True)
    weights = inference.state_dict()
    got = hidden_states(inference.config, weights, ids, [140], dtype=torch.float64, dense=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    sparse = hidden_states(inference.config, weights, ids, [140], dtype=torch.float64)
    assert (sparse - got).abs().max() > 1e-3, "the test would not see the difference"


@pytest.mark.parametrize("name", ["shared", "paper", "softmax"])
def test_gradients_are_those_of_finite_differences(name):
    """Selection is piecewise constant: away from a change of blocks the loss is smooth."""
    made = model(**VARIANTS[name])
    weights = {k: v.clone().requires_grad_() for k, v in made.state_dict().items()}
    ids = torch.randint(97, (100,), generator=torch.Generator().manual_seed(2))

    def loss(weights) -> torch.Tensor:
        x = hidden_states(made.config, weights, ids, [60, 40], dtype=torch.float64)
        return torch.nn.functional.cross_entropy(output_logits(made.config, weights, x)[:-1], ids[1:])

    loss(weights).backward()
    generator = torch.Generator().manual_seed(3)
    for key, value in weights.items():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (loss(weights | {key: value + step * direction}) for step in (1e-6, -1e-6))
        slope = (value.grad * direction).sum()
        torch.testing.assert_close(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp", "softmax"])
def test_fresh_weights_learn_in_every_part(kind):
    config = replace(CONFIG, compress_kind=kind, compress_positions=True, v_head_dim=4)
    weights = {k: v.requires_grad_() for k, v in fresh_weights(config, 0).items()}
    assert {k: v.shape for k, v in weights.items()} == parameter_shapes(config)
    ids = torch.randint(97, (100,), generator=torch.Generator().manual_seed(2))
    x = hidden_states(config, weights, ids, [60, 40])
    torch.nn.functional.cross_entropy(output_logits(config, weights, x)[:-1], ids[1:]).backward()
    for name, weight in weights.items():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name


def test_recomputing_layers_changes_no_gradient():
    made = model(torch.float32)
    ids = torch.randint(97, (96,), generator=torch.Generator().manual_seed(2))

    def gradients(recompute: bool) -> dict[str, torch.Tensor]:
        weights = {k: v.clone().requires_grad_() for k, v in made.state_dict().items()}
        hidden_states(made.config, weights, ids, [50, 46], recompute=recompute).square().sum().backward()
        return {k: v.grad for k, v in weights.items() if v.grad is not None}

    kept, again = gradients(False), gradients(True)
    assert kept.keys() == again.keys() and len(kept) > 20
    assert all(torch.equal(kept[k], again[k]) for k in kept)


def test_gates_alone_learn():
    """Where nothing but a gate needs a gradient, it gets the one that it has among all."""
    made = model(torch.float32)
    ids = torch.randint(97, (96,), generator=torch.Generator().manual_seed(2))
    gate = "model.layers.0.attn.g_proj.weight"

    def gradient(names) -> torch.Tensor:
        weights = {k: v.clone().requires_grad_(k in names) for k, v in made.state_dict().items()}
        hidden_states(made.config, weights, ids, [96]).square().sum().backward()
        return weights[gate].grad

    # Where keys need no gradient, another path compresses them: float32 sums in another order.
    torch.testing.assert_close(gradient([gate]), gradient(list(made.state_dict())), rtol=1e-3, atol=1e-4)


def test_float32_weights_get_float32_gradients_from_bfloat16_activations():
    made = model(torch.float32)
    weights = {k: v.clone().requires_grad_() for k, v in made.state_dict().items()}
    x = hidden_states(made.config, weights, torch.arange(40), [40], dtype=torch.bfloat16)
    assert x.dtype == torch.bfloat16
    x.float().square().sum().backward()
    assert {v.grad.dtype for v in weights.values() if v.grad is not None} == {torch.float32}
