"""One token through every layer of a model in one call of compiled code (`step.h`): what decoding on a CPU repeats.

As torch operations a step of the built-in model is some 1,700 calls, which take longer than reading its weights.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.library import library
from nsa_kernels.native import Call
from nsa_kernels.variant import Variant

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_MAPS = 8


class Map(NamedTuple):
    """y = (W x) * scale + bias. weight: (out, in) float32, bfloat16 or int8; scale, bias: (out,) or None."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


class Layer(NamedTuple):
    """One pre-norm block with SwiGLU, and its part of the cache: (S, HKV, D) views."""

    maps: Sequence[Map]  # q, k, v, gates, o, gate, up, down
    attn_norm: Tensor
    mlp_norm: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor


class _Map(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "type")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("map", _Map * _MAPS),
        *((name, ctypes.c_void_p) for name in ("attn_norm", "mlp_norm", "k", "v", "k_cmp", "v_cmp")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "heads", "threads", "q_bf16", "plain_cmp")),
        ("eps", ctypes.c_double),
        ("call", Call),
        ("layer", ctypes.POINTER(_Layer)),
        ("vocabulary", _Map),
        *((name, ctypes.c_void_p) for name in ("norm", "cos", "sin", "x", "logits")),
    ]


def supports(layer: Layer) -> bool:
    """Whether a model of layers like this one can be stepped: compiled code is there, and it has the element types."""
    keys = (layer.k, layer.v, layer.k_cmp, layer.v_cmp)
    weights = [m.weight for m in layer.maps]
    return (
        all(x.device.type == "cpu" for x in (*keys, *weights))
        and all(x.dtype in (torch.float32, torch.bfloat16) and x.stride(2) == 1 for x in keys)
        and layer.k.dtype == layer.v.dtype
        and layer.k_cmp.dtype == layer.v_cmp.dtype
        and all(w.dtype in _TYPES for w in weights)
        and library() is not None
    )


class DecodeStep:
    """Steps of one model over one cache."""

    def __init__(
        self,
        layers: Sequence[Layer],
        vocabulary: Map,
        norm: Tensor,
        eps: float,
        variant: Variant,
        dtype: torch.dtype,
        plain_cmp: bool,
    ) -> None:
        """dtype: of attention's products; all else is float32. plain_cmp: the compressed branch takes queries before
        their rotation.
        """
        first = layers[0]
        _, HKV, D = first.k.shape
        HQ = first.maps[0].weight.shape[0] // D
        self.variant, self._held = variant, []
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        keys = dict(k=first.k, v=first.v, k_cmp=first.k_cmp, v_cmp=first.v_cmp, k_swa=first.k, v_swa=first.v)
        self._step = _Step(
            layers=len(layers),
            hidden=norm.shape[0],
            heads=HKV,
            q_bf16=dtype == torch.bfloat16 and D % 2 == 0 and library().nsa_has_bf16(),
            plain_cmp=plain_cmp,
            eps=eps,
            call=Call.of(variant, HQ // HKV, D, D**-0.5, keys),
            layer=self._layers,
            vocabulary=self._map(vocabulary),
            norm=self._floats(norm),
        )

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
        """The token at `position`, whose key and value enter the cache; it must not complete a compression block.

        x: (H,) its embedding; cos, sin: (D/2,). Returns logits (vocab,).
        """
        x, cos, sin = (y.to(torch.float32, copy=True).contiguous() for y in (x, cos, sin))
        logits = torch.empty(self._step.vocabulary.rows)
        step = self._step
        step.x, step.cos, step.sin, step.logits = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), logits.data_ptr()
        step.threads = torch.get_num_threads()
        step.call.at(self.variant, position, 1)
        if library().nsa_decode_step(ctypes.byref(step)):
            raise MemoryError("no memory for a decode step's buffers")
        return logits

    def _layer(self, layer: Layer) -> _Layer:
        keys = (layer.k, layer.v, layer.k_cmp, layer.v_cmp)
        self._held += keys
        return _Layer(
            (_Map * _MAPS)(*map(self._map, layer.maps)),
            *map(self._floats, (layer.attn_norm, layer.mlp_norm)),
            *(x.data_ptr() for x in keys),
        )

    def _map(self, m: Map) -> _Map:
        weight = m.weight.contiguous()
        self._held.append(weight)
        return _Map(weight.data_ptr(), self._floats(m.scale), self._floats(m.bias), *weight.shape, _TYPES[weight.dtype])

    def _floats(self, x: Tensor | None) -> int | None:
        """Address of a float32 vector, kept as long as this object."""
        if x is None:
            return None
        self._held.append(x.detach().float().contiguous())
        return self._held[-1].data_ptr()
