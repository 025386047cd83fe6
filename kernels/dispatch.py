"""The one seam: tensors in, tensors out. The tensor at the call decides which implementation runs.

The same signatures in `gpu` (Triton; a CUDA or HIP tensor), `native` (C; a CPU's, where the machine has a compiler),
`cpu` (blocked torch operations, anywhere), `masked` (gradients on a CPU) and `reference` (the equations; float64).
"""

import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from nsa_kernels import cpu, masked, native, reference
from nsa_kernels.packing import Packing
from nsa_kernels.reference import Phi
from nsa_kernels.variant import Variant

__all__ = ["Packing", "Phi", "Variant", "compress", "dense_attention", "nsa_attention"]


def _implementation(x: Tensor, *others: Tensor | None) -> ModuleType:
    """`others` may need gradients too, as gates do where nothing else is trained."""
    if x.dtype == torch.float64:
        return reference
    if x.is_cuda:  # HIP devices say so too
        return importlib.import_module("nsa_kernels.gpu")  # Triton is loaded where it is used
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))
    return masked if learning else cpu


def _current(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current GPU, wherever its tensors lie."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def compress(
    x: Tensor, variant: Variant, phi: Phi = None, position: Tensor | None = None, packing: Packing | None = None
) -> Tensor:
    """Compressed keys or values, (S, HKV, D) -> (NC, HKV, Do). See `reference.compress`."""
    if packing is not None:
        return reference.compress(x, variant, phi, position, packing)
    learned = phi if isinstance(phi, tuple) else (phi,)
    return _implementation(x, position, *learned).compress(x, variant, phi, position)


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    variant: Variant,
    *,
    packing: Packing | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """All three branches, gated and summed: o (T, HQ, Dv) and block_indices. See `reference.nsa_attention`.

    packing: of a batch whose sequences stand one after the other, S = T and offset 0; k_cmp, v_cmp as `compress` gives
    them, block_indices numbered within each sequence.
    """
    others = [options.get(name) for name in ("q_cmp", "k_swa", "v_swa")]
    found = _implementation(q, k, v, k_cmp, v_cmp, gates, *others)
    if packing is not None:
        if options.get("offset") or not k.shape[0] == q.shape[0] == packing.tokens:
            raise ValueError(f"a packed batch has no offset, and {packing.tokens} queries and keys")
        if found in (cpu, masked, reference):
            return packing.one_by_one(nsa_attention, q, k, v, k_cmp, v_cmp, gates, **options)
        options["packing"] = packing
    own = [options[name] for name in ("k_swa", "v_swa") if options.get(name) is not None]
    if found is cpu and native.supports(q, k, v, k_cmp, v_cmp, *own):
        found = native
    with _current(q):
        return found.nsa_attention(q, k, v, k_cmp, v_cmp, gates, variant, **options)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, offset: int = 0, scale: float | None = None) -> Tensor:
    """Causal full attention of T queries over offset+T keys. See `reference.dense_attention`."""
    with _current(q):
        return _implementation(q, k, v).dense_attention(q, k, v, offset=offset, scale=scale)
