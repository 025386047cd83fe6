"""The CPU's fast path in C (`native.c`).

It is faster than `cpu`, which needs no compiler: scores and probabilities stay in the first-level cache instead of
passing through memory between operations.
"""

import ctypes
import functools
import math

import torch
from torch import Tensor

from nsa_kernels.library import library
from nsa_kernels.rows import over_tasks
from nsa_kernels.variant import Variant

CLOSED_GATE = 2.0**-20  # products in bfloat16 leave a branch out whose gates are no larger (`open` in native.h)

_INTEGERS = (
    *("T", "offset", "S", "G", "D", "Dv", "NC", "l", "d", "block", "n", "initial", "local", "window", "chunk"),
    *("weight_first", "weights", "q_stride", "q_cmp_stride", "gates_stride", "out_stride", "chosen_stride"),
    *("k_stride", "v_stride", "k_cmp_stride", "v_cmp_stride", "k_swa_stride", "v_swa_stride"),
    *("k_head", "v_head", "k_cmp_head", "v_cmp_head", "k_swa_head", "v_swa_head", "kv_bf16", "cmp_bf16"),
)
_POINTERS = ("q", "q_cmp", "k", "v", "k_cmp", "v_cmp", "k_swa", "v_swa", "gates", "weight", "out", "chosen")


class Call(ctypes.Structure):
    """`nsa_call` of native.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]

    @classmethod
    def of(cls, variant: Variant, G: int, D: int, scale: float, keys: dict[str, Tensor]) -> "Call":
        """What does not change from call to call. keys: k, v, k_cmp, v_cmp, k_swa, v_swa, (S, HKV, D) each."""
        weights = _importance(variant)
        call = cls(
            G=G,
            D=D,
            Dv=keys["v"].shape[2],
            l=variant.compress_block,
            d=variant.compress_stride,
            block=variant.select_block,
            n=variant.select_count,
            initial=variant.initial_blocks,
            local=variant.local_blocks,
            window=variant.window,
            chunk=variant.topk_chunk if variant.topk == "streamed" else 0,
            weight_first=min(variant.importance_weights),
            weights=weights.numel(),
            weight=weights.data_ptr(),
            kv_bf16=keys["k"].dtype == torch.bfloat16,
            cmp_bf16=keys["k_cmp"].dtype == torch.bfloat16,
            scale=math.log2(math.e) * scale,
        )
        for name, x in keys.items():
            setattr(call, f"{name}_stride", x.stride(0))
            setattr(call, f"{name}_head", x.stride(1))
        return call

    def at(self, variant: Variant, offset: int, T: int) -> None:
        """Queries at offset .. offset+T-1."""
        self.T, self.offset, self.S = T, offset, offset + T
        self.NC = variant.compressed_count(offset + T)


def supports(q: Tensor, *keys: Tensor) -> bool:
    """Whether the compiled code computes this call: a compiler was found, and it has the element types."""
    if q.device.type != "cpu":
        return False
    types = (torch.float32, torch.bfloat16)
    if q.dtype not in types or any(k.dtype not in types for k in keys):
        return False
    found = library()
    if found is None or q.dtype == torch.float32:
        return found is not None
    return q.shape[2] % 2 == 0 and bool(found.nsa_has_bf16())  # bfloat16 is multiplied in pairs


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    variant: Variant,
    *,
    offset: int = 0,
    scale: float | None = None,
    q_cmp: Tensor | None = None,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All three branches; shapes and results as in `reference.nsa_attention`. Products in the dtype of q."""
    T, HQ, D = q.shape
    HKV, Dv = v.shape[1:]
    q, q_cmp, gates = (x.to(q.dtype).contiguous() for x in (q, q if q_cmp is None else q_cmp, gates))
    k, v, k_swa, v_swa = _rows(k, v, k if k_swa is None else k_swa, v if v_swa is None else v_swa)
    k_cmp, v_cmp = _rows(k_cmp, v_cmp)
    out = q.new_empty(T, HQ, Dv)
    chosen = torch.empty(T, HKV, variant.select_count, dtype=torch.int32)
    keys = dict(k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp, k_swa=k_swa, v_swa=v_swa)
    rows = dict(q=q, q_cmp=q_cmp, gates=gates, out=out, chosen=chosen)
    call = Call.of(variant, HQ // HKV, D, D**-0.5 if scale is None else scale, keys)
    call.at(variant, offset, T)
    for name, x in {**keys, **rows}.items():
        setattr(call, name, x.data_ptr())
    for name, x in rows.items():
        setattr(call, f"{name}_stride", x.stride(0))
    attend = getattr(library(), "nsa_attention_bf16" if q.dtype == torch.bfloat16 else "nsa_attention_f32")
    pointer = ctypes.byref(call)

    def run(task: tuple[int, slice]) -> None:
        head, rows = task
        if attend(pointer, head, rows.start, rows.stop - rows.start):
            raise MemoryError("no memory for attention's buffers")

    tasks = [(head, rows) for head in range(HKV) for rows in _runs(T, offset)]
    if T == 1:  # a decode step is over before threads have started
        for task in tasks:
            run(task)
    else:
        over_tasks(run, tasks)
    return out, chosen


@functools.cache
def _importance(variant: Variant) -> Tensor:
    """Eq. 9's weights, from the first offset that has one to the last."""
    weights = variant.importance_weights
    return torch.tensor([float(weights.get(i, 0)) for i in range(min(weights), max(weights) + 1)])


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Of one element type; any (S, HKV, D) view whose last dimension is contiguous will do."""
    if len({x.dtype for x in tensors}) > 1:
        tensors = tuple(x.float() for x in tensors)
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def _runs(T: int, offset: int) -> list[slice]:
    """Queries per task. More share a block's keys, which are packed once per task, but their sums leave the cache."""
    size = 512 if offset + T <= 16384 else 1024
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]
