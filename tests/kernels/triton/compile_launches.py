"""Compile what our kernels' own launch code would launch on a GPU that is not here, and report what it costs.

    python compile_launches.py flash cuda:90

Runs a process of its own, without the interpreter. Tensors are of the "meta" device: only shapes, strides and dtypes
count. Prints one JSON object per kernel: case, kernel, shared (bytes), spills (registers, all threads' own).
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
OF_EACH_VENDOR = {"D192/128 G128", "D64 G3 packed", "D64 G16 packed"}  # for one target each: 25 s of CPU a target
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
POINTERS |= {torch.int64: "*i64", torch.int16: "*i16", torch.int8: "*i8"}


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, dict]]:
    """The kernels that `call` launches with their arguments by name, instead of running them."""
    found: list[tuple[JITFunction, dict]] = []
    original = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        found.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = original
    return found


def specialized(kernel: JITFunction, arguments: dict) -> tuple:
    """What of these arguments is compiled in: another call with the same needs no compilation."""
    found = [kernel.__name__]
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if isinstance(value, int) and not parameter.is_constexpr:
            fixed = parameter.do_not_specialize
            value = value >= 2**31 if fixed else (value == 1, value % 16 == 0, value >= 2**31)
        found.append(value.dtype if isinstance(value, torch.Tensor) else value)
    return tuple(found)


def compile_for(target: str, kernel: JITFunction, arguments: dict):
    """What Triton would compile for these arguments, specialised as its launcher does it."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        whole = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), TARGETS[target], options)


def spills(target: str, compiled) -> int:
    """Bytes of registers spilled per thread (NVIDIA), or registers (AMD)."""
    if target.startswith("hip"):
        return int(re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])[1])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if target == "cuda:100" and (ptxas.parent / "ptxas-blackwell").exists():
        ptxas = ptxas.parent / "ptxas-blackwell"
    architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={architecture}", source, "-o", Path(directory) / "cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", report)[1])


def flash_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    from nsa_kernels.flash import flash_attention

    def run(HQ, HKV, D, Dv, dtype=torch.bfloat16, packed=False):
        q, k, v = (
            torch.empty(8192, h, d, device="meta", dtype=dtype, requires_grad=True)
            for h, d in ((HQ, D), (HKV, D), (HKV, Dv))
        )
        bounds = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
        o = flash_attention(q, k, v, cu_seqlens=bounds, max_seqlen=4096 if packed else None)
        o.backward(torch.empty_like(o))

    yield "D64 G3", lambda: run(9, 3, 64, 64)
    yield "D128 G16", lambda: run(64, 4, 128, 128)
    yield "D192/128 G16", lambda: run(64, 4, 192, 128)
    yield "D64 G16", lambda: run(32, 2, 64, 64)
    yield "D64 G3 packed fp16", lambda: run(9, 3, 64, 64, torch.float16, packed=True)
    yield "D192/128 G16 fp32", lambda: run(64, 4, 192, 128, torch.float32)


def builtin_variant():
    """What `nsa models install` makes."""
    from nsa_kernels.variant import Variant
    from nsa_models.install import manifests

    (manifest,) = manifests().values()
    return Variant(**{k: v for k, v in manifest.variant.items() if k in {field.name for field in fields(Variant)}})


def decode_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    from nsa_kernels.decode import decode_attention, decode_dense
    from nsa_kernels.variant import Variant

    def run(B, HQ, HKV, D, Dv, variant, dtype=torch.bfloat16, capacity=131072):
        rows = variant.compressed_count(capacity)
        caches = ((capacity, D), (capacity, Dv), (rows, D), (rows, Dv))
        k, v, k_cmp, v_cmp = (torch.empty(B, HKV, *shape, device="meta", dtype=dtype) for shape in caches)
        q, gates = (torch.empty(B, HQ, width, device="meta", dtype=dtype) for width in (D, 3))
        lengths = torch.empty(B, device="meta", dtype=torch.int32)
        decode_attention(q, k, v, k_cmp, v_cmp, gates, lengths, variant)
        decode_dense(q, k, v, lengths)

    paper, nsa_1b = Variant(), Variant(16, 16, 16, 16, 0, 1, 128, topk="streamed", topk_chunk=16)
    yield "D64 G3", lambda: run(1, 9, 3, 64, 64, paper)
    yield "D64 G3 built-in", lambda: run(1, 9, 3, 64, 64, builtin_variant())
    yield "D128 G16", lambda: run(16, 64, 4, 128, 128, paper)
    yield "D192/128 G16", lambda: run(64, 64, 4, 192, 128, paper)
    yield "D64 G16 blocks of 16", lambda: run(1, 32, 2, 64, 64, nsa_1b)
    yield "D192/128 G128", lambda: run(1, 128, 1, 192, 128, paper)
    yield "D64 G3 fp32", lambda: run(1, 9, 3, 64, 64, paper, torch.float32)


def append_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    from nsa_kernels.append import append, compress_newest
    from nsa_kernels.variant import Variant

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, device="meta", dtype=dtype)

    def run(B, HQ, HKV, D, Dv, kind, variant, capacity=131072):
        lengths, l = tensor(B, dtype=torch.int32), variant.compress_block
        k, v = tensor(B, HKV, capacity, D), tensor(B, HKV, capacity, Dv)
        k_cmp = tensor(B, HKV, variant.compressed_count(capacity), D)
        angles = tensor(capacity, D // 2, dtype=torch.float32), tensor(capacity, D // 2, dtype=torch.float32)
        append(tensor(B, HQ, D), tensor(B, HKV, D), tensor(B, HKV, Dv), k, v, lengths, *angles)
        phi = None if kind == "mean" else tensor(HKV, l * D, D)
        if kind == "mlp":
            phi = tensor(HKV, l * D, 2 * D), tensor(HKV, 2 * D), tensor(HKV, 2 * D, D), tensor(HKV, D)
        if kind == "softmax":
            phi = tensor(HKV, D), tensor(HKV, l), tensor(HKV, D, D)
        compress_newest(k, k_cmp, lengths, variant, phi, tensor(HKV, l, D), undo=angles, rotate=angles)
        compress_newest(k, k_cmp, lengths, variant)

    yield "D64 G3", lambda: run(1, 9, 3, 64, 64, "mean", Variant())
    yield "D192/128 G16", lambda: run(64, 64, 4, 192, 128, "mlp", Variant())
    yield "D64 G16 blocks of 16", lambda: run(1, 32, 2, 64, 64, "linear", Variant(16, 16, 16, 16, 0, 1, 128))
    yield "D64 G3 blocks of 32", lambda: run(1, 9, 3, 64, 64, "softmax", Variant(32, 32))
    yield "D192/128 G16 blocks of 64", lambda: run(64, 64, 4, 192, 128, "softmax", Variant(64, 32))


def attend(HQ, HKV, D, Dv, variant, T, offset=0, packing=None) -> None:
    """`gpu.nsa_attention` of T queries after `offset` tokens, forward and backward."""
    from nsa_kernels import gpu, selected

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, device="meta", dtype=dtype, requires_grad=dtype.is_floating_point)

    def choosers(chosen, blocks):  # sorts and counts, which meta tensors cannot
        HKV, long = chosen.shape[1], torch.int64
        pieces, starts = tensor(HKV, 2 * blocks, 3, dtype=long), tensor(HKV, blocks + 1, dtype=long)
        return selected.Choosers(tensor(chosen.numel(), dtype=torch.int32), pieces, starts)

    selected.Choosers.of = staticmethod(choosers)
    S = offset + T
    NC = packing.keys if packing else variant.compressed_count(S)
    q, k, v, gates = tensor(T, HQ, D), tensor(S, HKV, D), tensor(S, HKV, Dv), tensor(T, HQ, 3)
    cmp = tensor(NC, HKV, D), tensor(NC, HKV, Dv)
    o, _ = gpu.nsa_attention(q, k, v, *cmp, gates, variant, offset=offset, packing=packing)
    o.backward(torch.empty_like(o))


def gpu_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    from nsa_kernels.packing import Packing
    from nsa_kernels.variant import Variant

    def run(HQ, HKV, D, Dv, variant, T=8192, sequences=None):
        packing = sequences and Packing(torch.empty(sequences + 1, device="meta", dtype=torch.int32), T, variant)
        attend(HQ, HKV, D, Dv, variant, T, packing=packing)

    yield "D64 G3", lambda: run(9, 3, 64, 64, Variant(32, 32))
    yield "D64 G3 built-in", lambda: run(9, 3, 64, 64, builtin_variant())
    yield "D128 G16", lambda: run(64, 4, 128, 128, Variant())
    yield "D192/128 G16", lambda: run(64, 4, 192, 128, Variant())
    streamed = Variant(16, 16, 16, 16, 0, 1, 128, topk="streamed", topk_chunk=16)
    yield "D64 G16 blocks of 16", lambda: run(32, 2, 64, 64, streamed)
    yield "D192/128 G128", lambda: run(128, 1, 192, 128, Variant())
    yield "D64 G3 packed", lambda: run(9, 3, 64, 64, Variant(), sequences=5)
    yield "D64 G16 packed", lambda: run(32, 2, 64, 64, Variant(), sequences=5)


def print_specialized(target: str) -> None:
    """One JSON list of what is compiled for each of several prompts, and one for each of several caches."""
    from nsa_kernels.decode import decode_attention
    from nsa_kernels.variant import Variant

    def show(kind: str, call: Callable[[], object]) -> None:
        print(json.dumps([kind, sorted({str(specialized(*launch)) for launch in launches(call)})]))

    for T, offset in ((4096, 0), (4111, 0), (333, 4096), (1, 5001)):
        show("G3", partial(attend, 9, 3, 64, 64, Variant(), T, offset))
    for T, offset in ((4096, 0), (2, 1333)):
        show("G16", partial(attend, 32, 2, 64, 64, Variant(), T, offset))
    for capacity in (8128, 8256, 9280):
        rows = Variant().compressed_count(capacity)
        shapes = (1, 9, 64), *((1, 3, count, 64) for count in (capacity, capacity, rows, rows)), (1, 9, 3)
        x = [torch.empty(*shape, device="meta", dtype=torch.bfloat16) for shape in shapes]
        lengths = torch.empty(1, device="meta", dtype=torch.int32)
        show("decode", partial(decode_attention, *x, lengths, Variant()))


def main(suite: str, target: str, only: str = "") -> None:
    for name in ("ranged", "select", "selected", "decode", "flash"):
        __import__(f"nsa_kernels.{name}", fromlist=[name]).target_of = lambda x: target
    if suite == "specialized":
        print_specialized(target)
        return
    for case, call in globals()[f"{suite}_cases"]():
        if only not in case or (case in OF_EACH_VENDOR and target not in ("cuda:80", "hip:gfx942")):
            continue
        seen = set()
        for kernel, arguments in launches(call):
            constants = tuple((n, v) for n, v in arguments.items() if not isinstance(v, torch.Tensor))
            if (kernel.__name__, constants) in seen:
                continue
            seen.add((kernel.__name__, constants))
            compiled = compile_for(target, kernel, arguments)
            cost = {"shared": compiled.metadata.shared, "spills": spills(target, compiled)}
            print(json.dumps({"case": case, "kernel": kernel.__name__} | cost), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
