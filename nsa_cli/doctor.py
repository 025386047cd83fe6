"""What this machine offers, check by check, each with a remedy where something is missing."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from nsa_cli.config import config_path, read_config
from nsa_cli.settings import BUILTIN, cache_dir, data_dir, models_dir, resolve_model
from nsa_cli.units import format_bytes
from nsa_models.errors import NSAError

OK, SLOW, BROKEN = "ok", "slow", "broken"
LEAST_MEMORY = 1_000_000_000  # the built-in model and a document of some ten thousand tokens
LEAST_DISK = 1_000_000_000  # a stored context of 40,000 tokens


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, its state, what was found, and what to do about it."""

    name: str
    state: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:6}  {self.name:8}  {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def examine(root: click.Group, model: str | None) -> list[Finding]:
    """Every check, none of which changes anything or needs another to pass."""
    findings = [Finding("python", OK, f"{platform.python_version()} at {sys.executable}"), check_torch()]
    if findings[-1].state == OK:
        findings += [check_compiler(), check_cpu(), *check_gpu()]
    findings += [check_memory(), check_model(model), check_settings(root)]
    findings += [check_folder("models", data_dir()), check_folder("cache", cache_dir())]
    return findings


def check_torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", BROKEN, f"cannot be imported: {' '.join(str(error).split())}", "pip install torch")
    return Finding("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_compiler() -> Finding:
    from nsa_kernels.library import library

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        found = "none: attention on a CPU runs as torch operations"
        return Finding("compiler", SLOW, found, "install gcc or clang")
    if library() is None:
        found = f"{compiler} cannot compile the C source: attention on a CPU runs as torch operations"
        return Finding("compiler", SLOW, found, "install the C library's headers (libc6-dev), or another compiler")
    return Finding("compiler", OK, f"{compiler}; its code runs")


def check_cpu() -> Finding:
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    features = [name for name, value in torch.cpu.get_capabilities().items() if value is True and "bf16" in name]
    found = f"{platform.machine()}, {os.cpu_count()} cores, {level}"
    if features:
        return Finding("cpu", OK, f"{found}, {', '.join(features)}")
    return Finding("cpu", SLOW, f"{found}, no bfloat16 instructions: computes in float32", "a newer CPU or a GPU")


def check_gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = "no driver" if torch.version.cuda or torch.version.hip else "this torch is built for CPUs"
        yield Finding("gpu", OK, f"none that torch can use ({built}); nsa runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding("gpu", OK, f"{about.name}, {format_bytes(about.total_memory)}")
    try:
        yield Finding("triton", OK, version("triton"))
    except PackageNotFoundError:
        found = "not installed: attention on the GPU runs as torch operations"
        yield Finding("triton", SLOW, found, "pip install triton")


def check_memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free"
    if memory.available < LEAST_MEMORY:
        return Finding("memory", BROKEN, found, "close other programs; the built-in model needs about 1 GB")
    return Finding("memory", OK, found)


def check_model(name: str | None) -> Finding:
    """The model that a question would be asked: its files, not whether it computes (`nsa models check`)."""
    from nsa_models.formats import read_config as read_model_config
    from nsa_models.formats import weights_bytes

    try:
        directory = resolve_model(name)
        config, size = read_model_config(directory), weights_bytes(directory)
    except NSAError as error:
        remedy = "" if "nsa models install" in str(error) else f"nsa models install {BUILTIN}"
        return Finding("model", BROKEN, str(error), remedy)
    others = sorted(p.parent.name for p in models_dir().glob("*/config.json") if p.parent != directory)
    also = f"; also installed: {', '.join(others)}" if others else ""
    return Finding(
        "model", OK, f"{directory.name}, {config.max_position_embeddings:,} tokens, {format_bytes(size)}{also}"
    )


def check_settings(root: click.Group) -> Finding:
    try:
        read_config(root)
    except NSAError as error:
        return Finding("settings", BROKEN, str(error), "mend or remove that line")
    state = "no file, defaults" if not config_path().exists() else "read"
    return Finding("settings", OK, f"{config_path()}: {state}")


def check_folder(name: str, folder: Path) -> Finding:
    """Whether files can be written there, or in the nearest folder above that exists, and how much room is left."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    variable = "NSA_DATA_DIR" if name == "models" else "NSA_CACHE_DIR"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, BROKEN, f"{folder} cannot be written to", f"mend its permissions or set {variable}")
    free = shutil.disk_usage(there).free
    found = f"{folder}, {format_bytes(free)} free"
    if free < LEAST_DISK:
        return Finding(name, BROKEN, found, f"free some of the disk (nsa cache rm --all) or set {variable}")
    return Finding(name, OK, found)
