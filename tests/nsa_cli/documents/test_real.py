"""Packages as they are installed: whatever is in them is read or named, and nothing is a traceback."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.parametrize("package", ["matplotlib", "hypothesis", "charset_normalizer", "pip"])
def test_every_file_of_a_package_is_read_or_has_a_reason(nsa, package, monkeypatch) -> None:
    root = Path(find_spec(package).origin).parent
    monkeypatch.delenv("NSA_MODEL")
    monkeypatch.setenv("NSA_DATA_DIR", "/nonexistent")  # without a model no tokens are counted, so it is fast
    run = nsa("pack", root, "--hidden", "--no-gitignore", "--no-default-ignores", "--format", "json")
    assert run.code == 0, run.err
    packed = json.loads(run.out)
    found = {entry["path"] for entry in (*packed["files"], *packed["skipped"])}
    names = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    assert found == {os.path.relpath(name, root) for name in names}
    for file in packed["files"]:
        if file["path"].endswith(".py"):
            assert file["text"].split() == (root / file["path"]).read_text("utf-8").split()
