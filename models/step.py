"""The next token's logits from one token and the cache, on the quickest path that computes them."""

import torch
from torch import Tensor

from nsa_kernels.step import DecodeStep, Layer, Map, supports
from nsa_models.cache import Cache
from nsa_models.linear import Linear
from nsa_models.rope import Rope
from nsa_models.transformer import NSAModel


class Step:
    """`model.advance` of one token and its logits: a CUDA graph on a GPU; compiled on a CPU, except where a token
    completes a compression block (1 in `compress_stride`), whose compression is the model's own.
    """

    def __init__(self, model: NSAModel, cache: Cache, dense: bool = False) -> None:
        self.model, self.cache, self.dense = model, cache, dense
        self.rope = Rope(model.config, cache.rope_factor)
        self.captured = _captured(model, cache, dense)
        self.compiled = None if dense or self.captured else _compiled(model, cache)

    @torch.no_grad()
    def __call__(self, token: int) -> Tensor:
        """Append `token` to the cache. Returns (vocab,) in float32 or better."""
        model, cache, count = self.model, self.cache, self.model.config.variant.compressed_count
        cache.require_room(1)
        cache.turn()
        if self.captured is not None:
            logits = self.captured.run(token, cache.length)
            cache.length += 1
            return logits
        ids = torch.tensor([token])
        if self.compiled is None or count(cache.length) != count(cache.length + 1):
            return model.logits(model.advance(ids, cache, self.dense))[0]
        cos, sin = self.rope.angles(cache.positions(cache.length, cache.length + 1), model.dtype)
        x = model.model.embeddings(ids, torch.float32)
        logits = self.compiled.run(x[0], cos.flatten(), sin.flatten(), cache.length)
        cache.length += 1
        return logits


def _captured(model: NSAModel, cache: Cache, dense: bool):
    """None where the model is on a CPU, or its cache of another type."""
    if model.device.type != "cuda":
        return None
    from nsa_models import graph  # Triton is loaded where it is used

    return graph.CapturedStep(model, cache, dense) if graph.supports(model, cache) else None


def _compiled(model: NSAModel, cache: Cache) -> DecodeStep | None:
    """None where there is no compiled code for this model."""
    config = model.config
    if config.branch_kv or model.dtype == torch.float64:
        return None
    layers = [_layer(layer, cache) for layer in model.model.layers]
    if not supports(layers[0]):
        return None
    table = model.model.embeddings
    vocabulary = _map(model.lm_head) if model.lm_head is not None else Map(table.weight, table.weight_scale)
    return DecodeStep(
        layers,
        vocabulary,
        model.model.norm.weight,
        config.norm_eps,
        config.variant,
        model.dtype,
        plain_cmp=config.compress_rope == "none",
    )


def _layer(layer, cache: Cache) -> Layer:
    attn, mlp = layer.attn, layer.mlp
    maps = (attn.q_proj, attn.k_proj, attn.v_proj, attn.g_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    keys = (cache.read(attn.layer, name) for name in ("k", "v", "k_cmp", "v_cmp"))
    return Layer([_map(m) for m in maps], layer.attn_norm.weight, layer.mlp_norm.weight, *keys)


def _map(linear: Linear) -> Map:
    return Map(linear.weight, linear.weight_scale, linear.bias)
