"""Imports point down: nsa_cli -> nsa_models -> nsa_kernels; and `nsa --help` is quick because it imports little."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"kernels": "nsa_kernels", "models": "nsa_models", "nsa_cli": "nsa_cli"}
MAY_IMPORT = {
    "nsa_kernels": {"nsa_kernels"},
    "nsa_models": {"nsa_kernels", "nsa_models"},
    "nsa_cli": {"nsa_kernels", "nsa_models", "nsa_recipes", "nsa_cli"},
}
HEAVY = "torch", "numpy", "tokenizers", "triton", "safetensors"


def imported(source: str) -> set[str]:
    """Top-level names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module.split(".")[0])
    return names


def test_imported_sees_every_kind_of_import():
    source = "import a.b\ndef f():\n    from c.d import e\nif TYPE_CHECKING:\n    import g as h"
    assert imported(source) == {"a", "c", "g"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        ours = {name for name in imported(file.read_text()) if name.startswith("nsa")}
        assert ours <= MAY_IMPORT[FOLDERS[folder]], file


def test_the_cli_starts_without_heavy_modules():
    code = f"import sys, nsa_cli.cli; nsa_cli.cli.run(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "summarize" in run.stdout


def test_help_is_quick():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nsa_cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.2
