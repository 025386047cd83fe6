"""Compile every Triton kernel at every shipped shape for one target, without its device; a JSON line each.

python compile_for.py cuda:90|hip:gfx942 [SHAPE...]
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nsa_kernels import ranged, select, selected
from nsa_kernels.variant import Variant

# (query heads of a group, d_qk, d_v, variant)
SHAPES = {
    "paper": (16, 192, 128, Variant()),
    "d128": (16, 128, 128, Variant()),
    "built-in": (3, 64, 64, Variant(compress_block=32, compress_stride=32)),
    "NSA-1B": (16, 64, 64, Variant(16, 16, 16, 16, 0, 1, 128, topk="streamed", topk_chunk=16)),
}
FLOATS = {"scale", "lse", "delta", "weight"}
INTEGERS = {"chosen": "*i32", "queries": "*i32", "starts": "*i64"}
POINTERS = {"q", "k", "v", "o", "do", "dq", "dk", "dv_"}


def signature(kernel, constants: dict) -> dict[str, str]:
    """Types of a kernel's arguments: bfloat16 tensors, float32 statistics, 32-bit sizes and strides."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in POINTERS:
            types[name] = "*bf16"
        elif name in FLOATS:
            types[name] = "fp32" if name == "scale" else "*fp32"
        else:
            types[name] = INTEGERS.get(name, "i32")
    return types


def launches(G: int, D: int, DV: int, v: Variant, hip: bool):
    """Name, kernel and the settings that the wrappers launch it with."""
    tile = ranged.tiles(D, DV, hip)
    base = dict(G=G, D=D, DV=DV, PRECISION="tf32", **tile)
    ranges = {
        "dense": dict(L=1, STRIDE=1, WINDOW=0),
        "window": dict(L=1, STRIDE=1, WINDOW=v.window),
        "compressed": dict(L=v.compress_block, STRIDE=v.compress_stride, WINDOW=0),
    }
    for branch, constants in ranges.items():
        for kernel in (ranged._forward, ranged._backward_q, ranged._backward_kv):
            yield f"{branch}{kernel.__name__}", kernel, base | constants
    yield "select", select._select, select.settings(G, D, v)
    shape, rows, keys = selected.settings(G, D, DV, v.select_block, hip)
    yield "selected_forward", selected._forward, shape | rows | dict(COUNT=v.select_count)
    yield "selected_backward_q", selected._backward_q, shape | rows | dict(COUNT=v.select_count)
    yield "selected_backward_kv", selected._backward_kv, shape | keys


def compile_one(kernel, settings: dict, target: GPUTarget) -> dict:
    options = {name: settings[name] for name in ("num_warps", "num_stages") if name in settings}
    constants = {name: value for name, value in settings.items() if name not in options}
    source = ASTSource(kernel, signature(kernel, constants), constants)
    built = triton.compile(source, target=target, options=options)
    binary = built.asm["cubin" if target.backend == "cuda" else "hsaco"]
    return {"shared": built.metadata.shared, "bytes": len(binary), **options}


def main() -> None:
    backend, _, arch = sys.argv[1].partition(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    for shape in sys.argv[2:] or SHAPES:
        for name, kernel, settings in launches(*SHAPES[shape], backend == "hip"):
            print(json.dumps({"shape": shape, "kernel": name} | compile_one(kernel, settings, target)), flush=True)


if __name__ == "__main__":
    main()
