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
from nsa_models.positions import positions
from nsa_models.rope import Rope, rotate

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Span:
    """Queries of a sequence whose keys have the same rotations: all of them, or those of a chunk of positions."""

    start: int  # the first query; it ends with the keys
    rope: Rope
    at: Tensor  # (S,) positions of the sequence up to its last query
    cos: Tensor  # (S, 1, D/2)
    sin: Tensor

    @property
    def queries(self) -> slice:
        return slice(self.start, self.at.shape[0])

    @property
    def whole(self) -> bool:
        """Whether every token stands right behind the one before it."""
        return self.start == 0

    @property
    def unbroken(self) -> tuple[Tensor, Tensor]:
        """cos and sin as if it were so."""
        return self.rope.angles(torch.arange(self.at.shape[0], device=self.at.device), self.cos.dtype)


@dataclass(frozen=True)
class Keys:
    """What one layer chooses blocks by, for T queries of one sequence."""

    start: int  # the first of them
    q: Tensor  # (T, HQ, D), rotated
    q_cmp: Tensor  # (T, HQ, D), the compressed branch's
    k: Tensor  # (start + T, HKV, D), rotated, of the selected branch
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
    with (layer, its output (T, H)). watch: called with (sequence, its keys) in every layer, span by span, before its
    attention.
    """
    if sum(lengths) != ids.shape[0]:
        raise ValueError(f"lengths add up to {sum(lengths)}, not to {ids.shape[0]} tokens")
    spans = [_spans(config, length, max(length, context), ids.device, dtype) for length in lengths]
    x = functional.embedding(ids, weights["model.embeddings.weight"]).to(dtype)

    for i in range(config.num_hidden_layers):

        def layer(x: Tensor, name: str = f"model.layers.{i}") -> Tensor:
            return _layer(config, weights, name, x, spans, lengths, dense, watch)

        x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        each(i, x)
    return _norm(config, weights, "model.norm", x)


def _spans(config: NSAConfig, length: int, context: int, device, dtype: torch.dtype) -> list[Span]:
    """Of a sequence of `length` tokens, in a context of so many. The first two chunks see one another as they stand."""
    rope, size = Rope(config, config.rope_factor(context)), config.position_chunk or length
    spans = []
    for start in (0, *range(2 * size, length, size)):
        stop = min(start + size if start else 2 * size, length)
        at = positions(config, torch.arange(stop, device=device), (stop - 1) // size)
        spans.append(Span(start, rope, at, *rope.angles(at, dtype)))
    return spans


def output_logits(config: NSAConfig, weights: Weights, x: Tensor) -> Tensor:
    """(T, H) -> (T, vocab) in float32 or better."""
    table = weights["model.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"]
    y = functional.linear(x, table.to(x.dtype))
    return y if y.dtype == torch.float64 else y.float()


def _layer(config, weights, name: str, x: Tensor, spans, lengths, dense: bool, watch) -> Tensor:
    h = _norm(config, weights, f"{name}.attn_norm", x)
    o = _attention(config, weights, f"{name}.attn", h, spans, lengths, dense, watch)
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


def _attention(config: NSAConfig, weights, name: str, h: Tensor, spans, lengths, dense: bool, watch) -> Tensor:
    """(T, HQ * Dv), before the output projection."""
    branches = ("", "_cmp", "_swa") if config.branch_kv and not dense else ("",)
    q = _linear(weights, f"{name}.q_proj", h).unflatten(1, (config.num_heads, -1))
    keys = [
        _linear(weights, f"{name}.{kind}{branch}_proj", h).unflatten(1, (config.num_kv_heads, -1))
        for branch in branches
        for kind in "kv"
    ]
    gates = _linear(weights, f"{name}.g_proj", h).sigmoid().unflatten(1, (config.num_heads, 3))
    parts = zip(*(tensor.split(list(lengths)) for tensor in (q, gates, *keys)), spans, strict=True)
    outputs = []
    for i, (*part, of) in enumerate(parts):
        seen = None if watch is None else functools.partial(watch, i)
        outputs += [_one_span(config, weights, name, span, *part, dense=dense, watch=seen) for span in of]
    return torch.cat(outputs).flatten(1)


def _one_span(config: NSAConfig, weights, name: str, span: Span, q, gates, *keys, dense: bool, watch) -> Tensor:
    """q (T, HQ, D), gates (T, HQ, 3) of a sequence; keys: its k and v (T, HKV, D), with branch_kv those of the other
    branches too. Returns the span's (queries, HQ, Dv).
    """
    variant, (cos, sin), rows = config.variant, (span.cos, span.sin), span.queries
    k, v, *own = (x[: rows.stop] for x in keys)
    q, gates = q[rows], gates[rows]
    turned, k_turned = rotate(q, cos[rows], sin[rows]), rotate(k, cos, sin)
    if dense:
        return nsa_kernels.dense_attention(turned, k_turned, v, offset=rows.start)
    k_src, v_src, k_swa, v_swa = own or (k, v, None, None)
    if config.compress_rope == "before":
        k_src = k_turned if span.whole and not own else rotate(k_src, *span.unbroken)
    q_cmp = q if config.compress_rope == "none" else turned
    if watch is not None:
        wide = k_src.to(torch.promote_types(k_src.dtype, torch.float32))
        compressed = functools.partial(_compressed_keys, config, weights, name, wide, span)
        watch(Keys(rows.start, turned, q_cmp, k_turned, compressed))
    return nsa_kernels.nsa_attention(
        turned,
        k_turned,
        v,
        _compressed_keys(config, weights, name, k_src, span),
        nsa_kernels.compress(v_src, variant, _phi(weights, config.compress_kind, f"{name}.compress_v", v.dtype)),
        gates,
        variant,
        offset=rows.start,
        q_cmp=q_cmp,
        k_swa=rotate(k_swa, cos, sin) if own else None,
        v_swa=v_swa,
    )[0]


def _compressed_keys(config: NSAConfig, weights, name: str, k_src: Tensor, span: Span) -> Tensor:
    """(NC, HKV, D), rotated where the config says that compressed keys are."""
    position = weights.get(f"{name}.compress_k.position")
    position = None if position is None else position.to(k_src.dtype)
    phi = _phi(weights, config.compress_kind, f"{name}.compress_k", k_src.dtype)
    k_cmp = nsa_kernels.compress(k_src, config.variant, phi, position)
    if config.compress_rope == "none" or (config.compress_rope == "before" and span.whole):
        return k_cmp
    token = torch.arange(k_cmp.shape[0], device=k_src.device) * config.compress_stride
    first = span.at[token]  # a block stands where its first token does
    if config.compress_rope == "before":
        first = first - token
    return rotate(k_cmp, *span.rope.angles(first, k_src.dtype))


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
