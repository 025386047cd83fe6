"""Every kernel at every shipped shape is compiled ahead of time for the GPUs that nsa runs on, without having one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory that one program may have: 163 KB on sm_80, 227 on sm_90 and sm_100, 64 on gfx942.
TARGETS = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


@pytest.mark.parametrize(("target", "limit"), TARGETS.items(), ids=TARGETS)
def test_kernels_compile_and_fit(target: str, limit: int) -> None:
    """In a process of its own: here the kernels may belong to the interpreter."""
    script = Path(__file__).with_name("compile_for.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, target, "d128", "built-in"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    built = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(built) == 2 * 13
    too_large = [b for b in built if b["shared"] > limit]
    assert not too_large, too_large
