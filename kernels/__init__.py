"""Native Sparse Attention: tensors in, tensors out. `dispatch` decides by the tensor which implementation runs.

Attributes load on first use: a model's config needs `Variant`, which needs no torch.
"""

import importlib

_EXPORTS = {
    "NativeSparseAttention": "module",
    "Packing": "packing",
    "Phi": "reference",
    "Variant": "variant",
    "compress": "dispatch",
    "dense_attention": "dispatch",
    "nsa_attention": "dispatch",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
