"""The model as training sees it: one differentiable pass over packed sequences, with the inference model's parameters.

Inference fills a cache in place, chunk by chunk; this keeps every value, so that gradients can flow. The same weights
give the same logits (a test). Parameters come as a mapping under our checkpoint names, in any float type: they are cast
to the type of the activations where they are used, so that float32 master weights get float32 gradients.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import nsa_kernels
from nsa_models.config import NSAConfig
from nsa_models.delta import DOWN, UP
from nsa_models.rope import Rope, rotate

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Keys:
    """What one layer chooses blocks by, in one sequence."""

    q: Tensor  # (T, HQ, D), rotated
    q_cmp: Tensor  # (T, HQ, D), the compressed branch's
    k: Tensor  # (T, HKV, D), rotated, of the selected branch
    compressed: Callable[[], Tensor]  # (NC, HKV, D)


def hidden_states(
    config: NSAConfig,
    weights: Weights,
    ids: Tensor,
    lengths: Sequence[int],
    *,
    context: int = 0,
    dtype: torch.dtype = torch.float32,
    dense: bool = False,
    recompute: bool = False,
    each: Callable[[int, Tensor], None] = lambda layer, x: None,
    watch: Callable[[int, Keys], None] | None = None,
) -> Tensor:
    """ids: (T,), sequences of `lengths` tokens one after another. Returns the last hidden states (T, H), normed.

    context: tokens that positions are scaled for in sequences that are shorter. dense: full attention over the same
    weights. recompute: keep only each layer's input and compute the layer again in the backward pass. each: called
    with (layer, its output (T, H)). watch: called with (sequence, its keys) in every layer, before its attention.
    """
    if sum(lengths) != ids.shape[0]:
        raise ValueError(f"lengths add up to {sum(lengths)}, not to {ids.shape[0]} tokens")
    ropes = [Rope(config, config.rope_factor(max(length, context))) for length in lengths]
    angles = [
        (rope, *rope.angles(torch.arange(length, device=ids.device), dtype))
        for rope, length in zip(ropes, lengths, strict=True)
    ]
    x = functional.embedding(ids, weights["model.embeddings.weight"]).to(dtype)

    for i in range(config.num_hidden_layers):

        def layer(x: Tensor, name: str = f"model.layers.{i}") -> Tensor:
            return _layer(config, weights, name, x, angles, lengths, dense, watch)

        x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        each(i, x)
    return _norm(config, weights, "model.norm", x)


def output_logits(config: NSAConfig, weights: Weights, x: Tensor) -> Tensor:
    """(T, H) -> (T, vocab) in float32 or better."""
    table = weights["model.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"]
    y = functional.linear(x, table.to(x.dtype))
    return y if y.dtype == torch.float64 else y.float()


def _layer(config, weights, name: str, x: Tensor, angles, lengths, dense: bool, watch) -> Tensor:
    h = _norm(config, weights, f"{name}.attn_norm", x)
    o = _attention(config, weights, f"{name}.attn", h, angles, lengths, dense, watch)
    x = x + _linear(weights, f"{name}.attn.o_proj", o)
    h = _norm(config, weights, f"{name}.mlp_norm", x)
    gate, up = (_linear(weights, f"{name}.mlp.{side}_proj", h) for side in ("gate", "up"))
    return x + _linear(weights, f"{name}.mlp.down_proj", functional.silu(gate) * up)


def _norm(config: NSAConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"].to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, config.norm_eps)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b, plus the low-rank update (x down^T) up^T where there is one."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    y = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    up = weights.get(f"{name}.weight{UP}")
    if up is None:
        return y
    down = weights[f"{name}.weight{DOWN}"]
    return y + functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _attention(config: NSAConfig, weights, name: str, h: Tensor, angles, lengths, dense: bool, watch) -> Tensor:
    """(T, HQ * Dv), before the output projection."""
    branches = ("", "_cmp", "_swa") if config.branch_kv and not dense else ("",)
    q = _linear(weights, f"{name}.q_proj", h).unflatten(1, (config.num_heads, -1))
    keys = [
        _linear(weights, f"{name}.{kind}{branch}_proj", h).unflatten(1, (config.num_kv_heads, -1))
        for branch in branches
        for kind in "kv"
    ]
    gates = _linear(weights, f"{name}.g_proj", h).sigmoid().unflatten(1, (config.num_heads, 3))
    parts = zip(*(tensor.split(list(lengths)) for tensor in (q, gates, *keys)), angles, strict=True)
    outputs = []
    for i, part in enumerate(parts):
        seen = None if watch is None else functools.partial(watch, i)
        outputs.append(_one_sequence(config, weights, name, *part, dense=dense, watch=seen))
    return torch.cat(outputs).flatten(1)


def _one_sequence(config: NSAConfig, weights, name: str, q, gates, k, v, *rest, dense: bool, watch) -> Tensor:
    """q (T, HQ, D), gates (T, HQ, 3), k and v (T, HKV, D), with branch_kv those of the other branches: (T, HQ, Dv)."""
    *own, (rope, cos, sin) = rest
    variant = config.variant
    turned, k_turned = rotate(q, cos, sin), rotate(k, cos, sin)
    if dense:
        return nsa_kernels.dense_attention(turned, k_turned, v)
    k_src, v_src, k_swa, v_swa = own or (k, v, None, None)
    if config.compress_rope == "before":
        k_src = rotate(k_src, cos, sin) if own else k_turned
    q_cmp = q if config.compress_rope == "none" else turned
    if watch is not None:
        wide = k_src.to(torch.promote_types(k_src.dtype, torch.float32))
        watch(Keys(turned, q_cmp, k_turned, functools.partial(_compressed_keys, config, weights, name, wide, rope)))
    return nsa_kernels.nsa_attention(
        turned,
        k_turned,
        v,
        _compressed_keys(config, weights, name, k_src, rope),
        nsa_kernels.compress(v_src, variant, _phi(weights, config.compress_kind, f"{name}.compress_v", v.dtype)),
        gates,
        variant,
        q_cmp=q_cmp,
        k_swa=rotate(k_swa, cos, sin) if own else None,
        v_swa=v_swa,
    )[0]


def _compressed_keys(config: NSAConfig, weights, name: str, k_src: Tensor, rope: Rope) -> Tensor:
    """(NC, HKV, D), rotated where the config says that compressed keys are."""
    position = weights.get(f"{name}.compress_k.position")
    position = None if position is None else position.to(k_src.dtype)
    phi = _phi(weights, config.compress_kind, f"{name}.compress_k", k_src.dtype)
    k_cmp = nsa_kernels.compress(k_src, config.variant, phi, position)
    if config.compress_rope != "after":
        return k_cmp
    blocks = torch.arange(k_cmp.shape[0], device=k_src.device) * config.compress_stride  # at its block's first token
    return rotate(k_cmp, *rope.angles(blocks, k_src.dtype))


COMPRESSION = {
    "mean": (),
    "linear": ("weight",),
    "mlp": ("up.weight", "up.bias", "down.weight", "down.bias"),
    "softmax": ("score", "bias", "weight"),
}


def _phi(weights: Weights, kind: str, name: str, dtype: torch.dtype) -> nsa_kernels.Phi:
    """What compresses keys or values, as `nsa_kernels.compress` takes it."""
    parts = tuple(weights[f"{name}.{part}"].to(dtype) for part in COMPRESSION[kind])
    return parts if len(parts) > 1 else parts[0] if parts else None
