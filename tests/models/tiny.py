"""A model small enough to compute twice, and to differ from another one in every layer."""

import torch

from nsa_models import NSAConfig
from nsa_models.transformer import NSAModel

CONFIG = NSAConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=1024,
    gate_bias=True,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    select_count=4,
    window=32,
)


def random_model(config: NSAConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> NSAModel:
    """Always the same one: normal weights of 0.3, norms around 1."""
    model = NSAModel(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.3, generator=generator)
        if "norm" in name:
            parameter.add_(1)
    return model
