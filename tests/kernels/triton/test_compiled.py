"""Our kernels compile for every GPU we ship for, within its shared memory, without one being here."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_launches.py")
SHARED = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


def output(suite: str, target: str) -> list:
    """What the script prints, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, suite, target], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("suite", ["flash", "gpu", "decode", "append"])
def test_shipped_shapes_compile(suite: str) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as processes:  # a compilation uses one core
        compiled = zip(SHARED, processes.map(partial(output, suite), SHARED), strict=True)
    for target, kernels in compiled:
        for kernel in kernels:
            assert kernel["shared"] <= SHARED[target], (target, kernel)
            if "fp32" not in kernel["case"]:  # exact float32 products have no tensor cores and spill whatever the tiles
                assert kernel["spills"] <= 512, (target, kernel)  # bytes a thread; more is read back in the inner loop


def test_another_length_compiles_nothing_anew() -> None:
    """A prompt of odd length, a single token and another cache's capacity find their kernels compiled."""
    found: dict[str, list] = {}
    for kind, kernels in output("specialized", "cuda:90"):
        found.setdefault(kind, []).append(kernels)
    for first, *others in found.values():
        assert first and others
        for other in others:
            assert other == first
