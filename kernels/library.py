"""The C sources, compiled for this machine on first use with its own C compiler, as Triton does."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch

SOURCES = ("native.c", "native.h", "step.h")  # the first includes the others


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.system() == "Windows":
        return None
    text = [(resources.files("nsa_kernels") / name).read_bytes() for name in SOURCES]
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
    library.nsa_decode_step.argtypes = [ctypes.c_void_p]
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
        for name, content in zip(SOURCES, text, strict=True):
            (Path(scratch) / name).write_bytes(content)
        built = Path(scratch) / "native.so"
        source = str(Path(scratch) / SOURCES[0])
        command = [compiler, "-O3", tuned, "-pthread", "-shared", "-fPIC", "-o", str(built), source, "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        os.replace(built, target)
    return True
