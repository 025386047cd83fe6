"""The CPU's fast path in C: `native.c`, compiled for this machine on first use with its own C compiler, as Triton does.

It is faster than `cpu`, which needs no compiler: scores and probabilities stay in the first-level cache instead of
passing through memory between operations.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from nsa_kernels.rows import over_tasks
from nsa_kernels.variant import Variant

_INTEGERS = (
    *("T", "offset", "S", "G", "D", "Dv", "NC", "l", "d", "block", "n", "initial", "local", "window", "chunk"),
    *("weight_first", "weights", "q_stride", "q_cmp_stride", "gates_stride", "out_stride", "chosen_stride"),
    *("k_stride", "v_stride", "k_cmp_stride", "v_cmp_stride", "k_swa_stride", "v_swa_stride"),
    *("k_head", "v_head", "k_cmp_head", "v_cmp_head", "k_swa_head", "v_swa_head", "kv_bf16", "cmp_bf16"),
)
_POINTERS = ("q", "q_cmp", "k", "v", "k_cmp", "v_cmp", "k_swa", "v_swa", "gates", "weight", "out", "chosen")


class _Call(ctypes.Structure):
    """`nsa_call` of native.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def supports(q: Tensor, *keys: Tensor) -> bool:
    """Whether the compiled code computes this call: a compiler was found, and it has the element types."""
    if q.device.type != "cpu":
        return False
    types = (torch.float32, torch.bfloat16)
    if q.dtype not in types or any(k.dtype not in types for k in keys):
        return False
    library = _library()
    if library is None or q.dtype == torch.float32:
        return library is not None
    return q.shape[2] % 2 == 0 and bool(library.nsa_has_bf16())  # bfloat16 is multiplied in pairs


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
    T, HQ, _ = q.shape
    HKV, Dv = v.shape[1:]
    q, q_cmp, gates = (x.to(q.dtype).contiguous() for x in (q, q if q_cmp is None else q_cmp, gates))
    k, v, k_swa, v_swa = _rows(k, v, k if k_swa is None else k_swa, v if v_swa is None else v_swa)
    k_cmp, v_cmp = _rows(k_cmp, v_cmp)
    out = q.new_empty(T, HQ, Dv)
    chosen = torch.empty(T, HKV, variant.select_count, dtype=torch.int32)
    weights = _importance(variant)
    call = _Call(
        T=T,
        offset=offset,
        S=offset + T,
        G=HQ // HKV,
        D=q.shape[2],
        Dv=Dv,
        NC=variant.compressed_count(offset + T),
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
        kv_bf16=k.dtype == torch.bfloat16,
        cmp_bf16=k_cmp.dtype == torch.bfloat16,
        scale=math.log2(math.e) * (q.shape[2] ** -0.5 if scale is None else scale),
    )
    keys = dict(k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp, k_swa=k_swa, v_swa=v_swa)
    rows = dict(q=q, q_cmp=q_cmp, gates=gates, out=out, chosen=chosen)
    for name, x in {**keys, **rows, "weight": weights}.items():
        setattr(call, name, x.data_ptr())
    for name, x in {**keys, **rows}.items():
        setattr(call, f"{name}_stride", x.stride(0))
    for name, x in keys.items():
        setattr(call, f"{name}_head", x.stride(1))
    attend = getattr(_library(), "nsa_attention_bf16" if q.dtype == torch.bfloat16 else "nsa_attention_f32")
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


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled code, or None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.system() == "Windows":
        return None
    sources = [resources.files("nsa_kernels") / name for name in ("native.c", "native.h")]
    text = [source.read_bytes() for source in sources]
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_flags()} {compiler}"
    key = hashlib.sha256(b"\0".join([*text, machine.encode()])).hexdigest()[:16]
    for folder in (_cache_folder(), Path(tempfile.gettempdir()) / f"nsa-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _only_ours(folder):
                continue
            file = folder / f"native-{key}.so"
            if not file.is_file() and not _compile(compiler, text, file):
                return None
            return _typed(ctypes.CDLL(str(file)))
        except OSError:
            continue
    return None


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("nsa_attention_f32", "nsa_attention_bf16"):
        if hasattr(library, name):
            getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    return library


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nsa" / "kernels"


def _only_ours(folder: Path) -> bool:
    """Code is loaded from here: nobody else may have put it there (a name under /tmp can be guessed)."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _cpu_flags() -> str:
    """What a compiled file depends on where a home directory is shared between machines."""
    return " ".join(sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True))


def _compile(compiler: str, text: list[bytes], target: Path) -> bool:
    tuned = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for name, content in zip(("native.c", "native.h"), text, strict=True):
            (Path(scratch) / name).write_bytes(content)
        built = Path(scratch) / "native.so"
        command = [compiler, "-O3", tuned, "-shared", "-fPIC", "-o", str(built), str(Path(scratch) / "native.c"), "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        os.replace(built, target)
    return True
