"""Rotary positions (half-split, NeoX order) and their scaling for long contexts."""

import math

import torch
from torch import Tensor

from nsa_models.config import NSAConfig, RopeScaling


class Rope:
    """Rotations of q and k by position, for one context's scaling factor."""

    def __init__(self, config: NSAConfig, factor: float = 1.0) -> None:
        """factor: how many times longer than the trained context this one may become; 1 = unscaled."""
        self.frequency, self.magnitude = _frequencies(config, factor)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin of shape (T, 1, D/2), computed in float32 (positions reach 131072) or better."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        frequency = self.frequency.to(positions.device, compute)
        angle = positions.to(compute)[:, None] * frequency
        cos, sin = angle.cos() * self.magnitude, angle.sin() * self.magnitude
        return cos[:, None].to(dtype), sin[:, None].to(dtype)

    def undo(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The un-rotated keys again: the inverse rotation, magnitude included."""
        return rotate(x, cos, -sin) / self.magnitude**2


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """x: (T, H, D), cos and sin: (T, 1, D/2); pairs are (i, i + D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1, out=out)


def _frequencies(config: NSAConfig, factor: float) -> tuple[Tensor, float]:
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequency = config.rope_theta**-half  # (D/2,)
    scaling = config.rope_scaling
    if scaling is None or factor <= 1:
        return frequency, 1.0
    if scaling.kind == "linear":
        return frequency / factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequency, scaling), 1.0
    return _yarn(frequency, config, factor), 0.1 * scaling.mscale * math.log(factor) + 1.0


def _yarn(frequency: Tensor, config: NSAConfig, factor: float) -> Tensor:
    """arXiv 2309.00071, "NTK by parts": dimensions that turn more than beta_fast times within the trained context
    stay, those that turn less than beta_slow times are interpolated, a linear ramp between.
    """
    scaling = config.rope_scaling
    trained = scaling.original_max_position_embeddings

    def dimension(turns: float) -> float:
        return config.head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), config.head_dim - 1)
    index = torch.arange(config.head_dim // 2, dtype=torch.float64)
    interpolate = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - interpolate) + frequency / factor * interpolate


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: more than high_freq_factor turns within the trained context stay, less than low_freq_factor divide."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * keep + frequency / scaling.factor * (1 - keep)
