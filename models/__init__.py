"""Token ids in, token ids out: checkpoints, the NSA transformer, its cache and its engine.

Attributes load on first use, so that `import nsa_models.errors` (the CLI's start-up) does not import torch.
"""

import importlib

_EXPORTS = {
    "NSAConfig": "config",
    "NSAError": "errors",
    "NSAModel": "transformer",
    "Cache": "cache",
    "Sampling": "sampling",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "load_tokenizer": "tokenizer",
    "prefill": "engine",
    "decode": "engine",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
