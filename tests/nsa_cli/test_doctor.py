"""`nsa doctor`: what is broken is named, with what to do, and decides the exit code."""

import json
import shutil
import sys
from types import SimpleNamespace

import psutil

import nsa_cli.doctor
import nsa_kernels.library


def findings(run) -> dict[str, dict]:
    return {finding["name"]: finding for finding in map(json.loads, run.out.splitlines())}


def test_a_machine_that_has_everything(nsa, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "data"))
    run = nsa("doctor")
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert all(line.startswith(("ok      ", "slow    ")) for line in lines)
    names = [line.split()[1] for line in lines]
    assert names[:5] == ["python", "torch", "compiler", "cpu", "gpu"]
    assert names[-5:] == ["memory", "model", "settings", "models", "cache"]
    assert "tiny, 32,768 tokens" in run.out and str(tmp_path / "data") in run.out
    assert list(findings(nsa("doctor", "--json"))) == names
    assert not (tmp_path / "data").exists()  # it changes nothing


def test_every_fault_has_a_remedy(nsa, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    nothing = SimpleNamespace(available=100_000_000, total=2_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: nothing)
    monkeypatch.delenv("NSA_MODEL")
    run = nsa("doctor", "--json")
    found = findings(run)
    assert run.code == 1 and run.err == "nsa: broken: memory, model, cache\n"
    assert found["compiler"]["state"] == "slow" and found["compiler"]["remedy"] == "install gcc or clang"
    assert "nsa models install" in found["model"]["found"]
    for name in ("memory", "cache"):
        assert found[name]["state"] == "broken" and found[name]["remedy"]


def test_without_torch_the_rest_is_still_checked(nsa, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    run = nsa("doctor")
    assert run.code == 1 and "broken  torch" in run.out and "pip install torch" in run.out
    assert "ok      memory" in run.out and "compiler" not in run.out


def test_a_compiler_that_does_not_compile(nsa, monkeypatch):
    monkeypatch.setattr(nsa_kernels.library, "library", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "slow    compiler  /usr/bin/cc cannot compile" in nsa("doctor").out


def test_a_full_disk(nsa, monkeypatch):
    monkeypatch.setattr(nsa_cli.doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    run = nsa("doctor")
    assert run.code == 1 and "1 kB free; free some of the disk (nsa cache rm --all)" in run.out
