"""The one seam: tensors in, tensors out. The tensor at the call decides which implementation runs.

`compress` and `nsa_attention` have the same signature in `reference` (the equations), `cpu` (blocked, threaded) and
the Triton modules; float64 and anything that needs a gradient takes the reference.
"""

from torch import Tensor, is_grad_enabled
from torch import float64 as _float64

from nsa_kernels import cpu, reference
from nsa_kernels.reference import Phi
from nsa_kernels.variant import Variant

__all__ = ["Phi", "Variant", "compress", "dense_attention", "nsa_attention"]


def _implementation(x: Tensor):
    if x.dtype == _float64 or (x.requires_grad and is_grad_enabled()):
        return reference
    return cpu


def compress(x: Tensor, variant: Variant, phi: Phi = None, position: Tensor | None = None) -> Tensor:
    """Compressed keys or values, (S, HKV, D) -> (NC, HKV, Do). See `reference.compress`."""
    return _implementation(x).compress(x, variant, phi, position)


def nsa_attention(q: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """All three branches, gated and summed: o (T, HQ, Dv) and block_indices. See `reference.nsa_attention`."""
    return _implementation(q).nsa_attention(q, *args, **kwargs)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, offset: int = 0, scale: float | None = None) -> Tensor:
    """Causal full attention of T queries over offset+T keys. See `reference.dense_attention`."""
    return _implementation(q).dense_attention(q, k, v, offset=offset, scale=scale)
