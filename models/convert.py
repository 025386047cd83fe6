"""Dense checkpoint -> NSA checkpoint that starts where the dense model stood.

The gates are constants at first (their weights are zero, their biases +-`GATE_BIAS`): the selected branch alone
answers, compression is the mean, so that a context of at most n * l' tokens is exact dense attention.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nsa_models.checkpoint import save_checkpoint
from nsa_models.config import NSAConfig, RopeScaling
from nsa_models.dense import DenseSource, read_dense
from nsa_models.errors import ModelError
from nsa_models.quantize import quantize

# sigmoid(14) = 1 - 8e-7: with it the built-in base's logits stay within 2e-4 of the dense model's; 8 gave 6e-2.
GATE_BIAS = 14.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def convert(
    source: str | Path, target: str | Path, context: int, dtype: str, **variant: int | float | str
) -> NSAConfig:
    """Write an NSA checkpoint made from the dense one at `source`; see `to_nsa`. dtype: float32, bfloat16 or int8.

    Returns its config. Raises ModelError as one line if the source cannot be used or `target` exists.
    """
    if Path(target).exists():
        raise ModelError(f"{target} exists; remove it or name another place")
    dense = read_dense(source)
    config, tensors = to_nsa(dense, context, **variant)
    save_checkpoint(target, config, store(tensors, dtype), dense.files)
    return config


def to_nsa(
    dense: DenseSource, context: int, chunk: int | None = None, **variant: int | str
) -> tuple[NSAConfig, dict[str, Tensor]]:
    """Config and float32 tensors of the NSA model. context: tokens it shall read; where they are more than the dense
    model's, positions are those of dual chunks of `chunk` tokens (None: a quarter of what the dense model reads).
    variant: fields of NSAConfig (compress_kind, select_count, window, ...); compress_kind: mean, or linear or softmax,
    which start as the mean.
    """
    base = dense.config
    config = replace(base, max_position_embeddings=context, gate_bias=True, **variant)
    trained = base.max_position_embeddings
    if context > trained:
        if base.rope_scaling is not None:
            raise ModelError(
                f"a context of {context:,} tokens needs RoPE scaling, but the checkpoint has its own "
                f"({base.rope_scaling.kind}); give at most --context {trained}"
            )
        scaling = RopeScaling(context / trained, trained, kind="dual_chunk", chunk=chunk or _chunk(config, trained))
        config = replace(config, rope_scaling=scaling)
    return config, dict(dense.tensors) | gates(config) | means(config)


def _chunk(config: NSAConfig, trained: int) -> int:
    """A quarter of the trained length in whole selection blocks: half of it is the largest distance, which is where the
    built-in model's base reads best (of 8,192 tokens 1,024, 2,048 and 4,096 gave 4.91, 4.86 and 5.03 at 16k).
    """
    least = max(config.window, config.compress_block)
    return max(-(-least // config.select_block), trained // 4 // config.select_block) * config.select_block


def gates(config: NSAConfig) -> dict[str, Tensor]:
    """g_proj of every layer: zero weights, bias + for the selected branch, - for the compressed and the window's."""
    bias = torch.tensor([-GATE_BIAS, GATE_BIAS, -GATE_BIAS]).repeat(config.num_heads)
    out = {}
    for i in range(config.num_hidden_layers):
        out[f"model.layers.{i}.attn.g_proj.weight"] = torch.zeros(3 * config.num_heads, config.hidden_size)
        out[f"model.layers.{i}.attn.g_proj.bias"] = bias.clone()
    return out


def means(config: NSAConfig) -> dict[str, Tensor]:
    """Compression of every layer, learned kinds as the mean. ModelError for a kind that cannot be it."""
    out = {}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}.attn.compress_"
        for side, width in (("k", config.head_dim), ("v", config.v_head_dim)):
            out |= {f"{at}{side}.{name}": tensor for name, tensor in _mean(config, width).items()}
        if config.compress_positions:
            out[f"{at}k.position"] = torch.zeros(config.num_kv_heads, config.compress_block, config.head_dim)
    return out


def _mean(config: NSAConfig, width: int) -> dict[str, Tensor]:
    heads, block, identity = config.num_kv_heads, config.compress_block, torch.eye(width)
    if config.compress_kind == "mean":
        return {}
    if config.compress_kind == "linear":
        return {"weight": identity.repeat(heads, block, 1) / block}
    if config.compress_kind == "softmax":
        zeros = {"score": torch.zeros(heads, width), "bias": torch.zeros(heads, block)}
        return zeros | {"weight": identity.repeat(heads, 1, 1)}
    raise ModelError("compress_kind mlp cannot start as the mean of a block; convert with mean, linear or softmax")


def store(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors as a checkpoint file holds them; int8 keeps what it does not quantize in bfloat16."""
    if dtype == "int8":
        return {k: t if t.dtype == torch.int8 or "_scale" in k else t.bfloat16() for k, t in quantize(tensors).items()}
    return {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
