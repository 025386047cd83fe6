"""int8 weights with one scale per output channel: half of bfloat16's bytes, which is what a decode step reads."""

from collections.abc import Mapping

import torch
from torch import Tensor

# The wide maps. Gates, norms, biases and compression stay float: they are small, and sensitive.
QUANTIZED = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "down_proj.weight",
    "embeddings.weight",
    "lm_head.weight",
)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) float -> int8 of the same shape and float32 scales (out,), weight ~ int8 * scale.

    Scales are rounded up to bfloat16 values: torch's int8 kernel reads them so, and both ways of using the weight
    then agree.
    """
    exact = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    nearest = exact.bfloat16()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    scale = torch.where(nearest.float() < exact, above, nearest).float()
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def quantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its wide maps as int8 and their `X_scale` beside them."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(QUANTIZED):
            out[name], out[name + "_scale"] = quantize_int8(tensor)
        else:
            out[name] = tensor
    return out
