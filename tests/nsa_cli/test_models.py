"""`nsa models` and `nsa convert` from outside: what they print, exit codes, nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_cli.settings import BUILTIN
from nsa_models.install import VERSION, manifests, version


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def installed(data, tiny_checkpoint) -> Path:
    shutil.copytree(tiny_checkpoint, data / "models" / "tiny")
    return data / "models" / "tiny"


def fails(run, code: int, words: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert (run.code, run.out) == (code, "")
    assert words in run.err and run.err.startswith("nsa: ") and run.err.count("\n") == 1


def test_bare_prints_help(nsa) -> None:
    assert nsa("models") == nsa("models", "--help")
    assert nsa("models").code == 0 and "install" in nsa("models").out


class TestLs:
    def test_nothing_installed(self, nsa, data) -> None:
        assert nsa("models", "ls") == (0, f"{BUILTIN}  not installed; run: nsa models install {BUILTIN}\n", "")
        assert json.loads(nsa("models", "ls", "--json").out) == {"name": BUILTIN, "installed": False}

    def test_installed_ones(self, nsa, installed) -> None:
        run = nsa("models", "ls")
        assert run.code == 0 and f"tiny  32,768 tokens  0 MB  {installed}\n" in run.out
        rows = [json.loads(line) for line in nsa("models", "ls", "--json").out.splitlines()]
        size = (installed / "model.safetensors").stat().st_size
        row = {"name": "tiny", "installed": True, "path": str(installed), "context": 32768, "bytes": size}
        assert rows == [{"name": BUILTIN, "installed": False}, row]

    def test_a_broken_one_does_not_hide_the_others(self, nsa, installed) -> None:
        broken = installed.with_name("broken")
        broken.mkdir()
        (broken / "config.json").write_text("[]")
        (installed.with_name(".tiny.killed")).mkdir()
        shutil.copy(installed / "config.json", installed.with_name(".tiny.killed"))
        run = nsa("models", "ls")
        lines = run.out.splitlines()
        assert run.code == 0 and len(lines) == 3
        assert lines[0] == f"broken  unusable: {broken / 'config.json'}: not a JSON object"
        row = json.loads(nsa("models", "ls", "--json").out.splitlines()[0])
        assert row["installed"] and "not a JSON object" in row["error"]


class TestShow:
    def test_config_and_card(self, nsa, installed) -> None:
        run = nsa("models", "show", "tiny")
        about = json.loads(nsa("models", "show", "tiny", "--json").out)
        assert run.code == 0 and json.loads(run.out[run.out.index("{") :]) == about["config"]
        assert about["config"]["select_count"] == 4
        assert (about["context"], about["read_per_step"]) == (32768, 2047 + 4 * 64 + 64)
        assert "32,768 tokens of context, of which a step reads 2,367 at most" in run.out
        (installed / "MODEL_CARD.md").write_text("# Tiny\n")
        assert nsa("models", "show", installed).out.endswith("}\n\n# Tiny\n")

    def test_none(self, nsa, data) -> None:
        fails(nsa("models", "show"), 5, f"model {BUILTIN} is not installed; run: nsa models install")
        fails(nsa("models", "show", "tinny"), 5, "no checkpoint tinny")


class TestAdd:
    def test_a_name_for_a_checkpoint_elsewhere(self, nsa, data, tiny_checkpoint, tmp_path) -> None:
        (tmp_path / "a.txt").write_text("the quick fox\n")
        ask = ("ask", tmp_path / "a.txt", "who?", "--max-tokens", 5, "-m")
        fails(nsa(*ask, "mine"), 5, "no checkpoint mine")
        assert nsa("models", "add", tiny_checkpoint, "--name", "mine").code == 0
        assert nsa(*ask, "mine").out == nsa(*ask, tiny_checkpoint).out != ""
        assert "mine  32,768 tokens" in nsa("models", "ls").out
        fails(nsa("models", "add", tiny_checkpoint, "--name", "mine"), 3, "there is a model mine")
        assert nsa("models", "rm", "mine").code == 0 and (tiny_checkpoint / "config.json").exists()
        assert nsa("models", "add", tiny_checkpoint).err == f"tiny is {tiny_checkpoint}\n"

    def test_what_is_no_checkpoint_or_no_name(self, nsa, data, tiny_checkpoint, tmp_path) -> None:
        fails(nsa("models", "add", tmp_path, "--name", "a"), 5, "config.json")
        for name in ("../a", "a/b", ".a", ""):
            assert nsa("models", "add", tiny_checkpoint, "--name", name).code == 2
            assert nsa("models", "rm", name).code == 3
        fails(nsa("models", "add", tmp_path / "nowhere"), 5, "nowhere")

    def test_an_installed_one_is_removed_whole(self, nsa, installed) -> None:
        assert nsa("models", "rm", "tiny").code == 0 and not installed.exists()
        fails(nsa("models", "rm", "tiny"), 3, "no installed model 'tiny'")


class TestCheck:
    def test_a_sound_one(self, nsa, installed) -> None:
        run = nsa("models", "check", "tiny")
        assert (run.code, run.err) == (0, "")
        assert len(run.out.splitlines()) == 5 and all(line.startswith("ok  ") for line in run.out.splitlines())

    def test_a_weight_that_is_not_a_number(self, nsa, installed) -> None:
        tensors = load_file(installed / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
        save_file(tensors, installed / "model.safetensors")
        run = nsa("models", "check", "tiny")
        assert run.code == 5 and run.err.count("\n") == 1
        assert "model.layers.1.mlp.up_proj.weight holds values that are not finite (1 tensors do)" in run.err
        assert len(run.out.splitlines()) == 1  # what was sound before it

    @pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nsa", "nsa_format": 1, "num_heads": "x"}'])
    def test_an_unreadable_config(self, nsa, installed, content: str) -> None:
        (installed / "config.json").write_text(content)
        fails(nsa("models", "check", installed), 5, str(installed))


class TestInstall:
    def test_an_unknown_name(self, nsa, data) -> None:
        fails(nsa("models", "install", "tinny"), 5, f"no built-in model 'tinny'; there is {BUILTIN}")

    def test_a_wrong_base(self, nsa, data, tiny_gguf, tmp_path) -> None:
        fails(nsa("models", "install", "--base", tmp_path / "nowhere.gguf"), 5, "No such file or directory")
        fails(nsa("models", "install", "--base", tiny_gguf), 5, "is not the pinned")
        assert not data.exists()

    def test_installed_already(self, nsa, installed) -> None:
        there = installed.rename(installed.with_name(BUILTIN))
        (there / VERSION).write_text(version(manifests()[BUILTIN]) + "\n")
        run = nsa("models", "install", "--base", "nowhere")
        assert (run.code, run.out) == (0, "") and run.err.startswith(f"{BUILTIN} is installed: ")
        fails(nsa("models", "install", "--base", "nowhere", "--force"), 5, "No such file")

    def test_a_model_of_ones_own_is_no_earlier_release(self, nsa, installed) -> None:
        fails(nsa("models", "install", installed.name), 5, f"no built-in model 'tiny'; there is {BUILTIN}")

    @pytest.mark.parametrize("noted", [None, b"of another release\n", b"\xff"])
    def test_an_earlier_release_is_replaced_or_stays(self, nsa, installed, noted: bytes | None) -> None:
        there = installed.rename(installed.with_name(BUILTIN))
        if noted:
            (there / VERSION).write_bytes(noted)
        run = nsa("models", "install", "--base", "nowhere")
        assert run.code == 5 and "of an earlier release; writing it anew\n" in run.err and "No such file" in run.err
        assert nsa("models", "check", there).code == 0


class TestConvert:
    def test_a_gguf(self, nsa, tiny_gguf, tmp_path) -> None:
        out = tmp_path / "out"
        run = nsa("convert", tiny_gguf, out, "--context", 8192, "--select-count", 6)
        assert run == (0, "", f"{out}: 8,192 tokens of context, dense up to 384\n")
        assert nsa("models", "check", out).code == 0
        fails(nsa("convert", tiny_gguf, out), 5, "exists; remove it or name another place")

    @pytest.mark.parametrize("kind", ["linear", "softmax"])
    def test_learned_compression(self, nsa, tiny_gguf, tmp_path, kind: str) -> None:
        out = tmp_path / "out"
        learned = ("--context", 8192, "--compress-kind", kind)
        fails(nsa("convert", tiny_gguf, out, *learned), 5, "learned compression needs compress_rope after or none")
        assert nsa("convert", tiny_gguf, out, *learned, "--compress-rope", "after").code == 0
        assert json.loads((out / "config.json").read_text())["compress_kind"] == kind
        assert nsa("models", "check", out).code == 0

    def test_positions_in_a_longer_context(self, nsa, tiny_gguf, tmp_path) -> None:
        out = tmp_path / "out"
        assert nsa("convert", tiny_gguf, out, "--context", 131072, "--chunk", 640).code == 0
        scaling = json.loads((out / "config.json").read_text())["rope_scaling"]
        assert (scaling["kind"], scaling["chunk"]) == ("dual_chunk", 640)
        assert nsa("models", "check", out).code == 0

    def test_what_cannot_be(self, nsa, tiny_gguf, tmp_path) -> None:
        out = tmp_path / "out"
        fails(nsa("convert", tmp_path / "nowhere", out), 5, "no such checkpoint")
        fails(nsa("convert", tiny_gguf, out, "--chunk", 100), 5, "chunk (100) must be a multiple of select_block (64)")
        fails(nsa("convert", tiny_gguf, out, "--select-count", 2), 5, "exceed select_count (2)")
        for option in ("--context", "--compress-block", "--select-count"):
            run = nsa("convert", tiny_gguf, out, option, 0)
            assert run.code == 2 and option in run.err
        assert not out.exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch, gguf, tokenizers
import nsa_models.checkpoint, nsa_models.install as install
from nsa_cli.cli import run
base, args = Path(sys.argv[1]), sys.argv[2:]
if "install" in args:
    import hashlib
    found = dict(package="p==1", file="tiny.gguf", sha256=hashlib.sha256(base.read_bytes()).hexdigest())
    manifest = install.Manifest(args[2], found, 8192, "float32", {}, [])
    install.manifests = lambda: {manifest.name: manifest}
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
sys.exit(run(args))
"""


@pytest.mark.parametrize("command", ["convert", "install"])
def test_a_full_disk_leaves_nothing_half_written(command: str, data, tiny_gguf, tmp_path) -> None:
    """By a limit on the size of files, which the weights exceed: exit code 1, one line, an empty folder."""
    out = tmp_path / "out"
    out.mkdir()
    arguments = {
        "convert": ["convert", str(tiny_gguf), str(out / "model")],
        "install": ["models", "install", BUILTIN, "--base", str(tiny_gguf)],
    }
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tiny_gguf), *arguments[command]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert "cannot write the checkpoint" in run.stderr.splitlines()[-1]
    assert [line for line in run.stderr.splitlines() if line.startswith("nsa: ")] == run.stderr.splitlines()[-1:]
    assert not list(out.iterdir()) and not list((data / "models").glob("*") if data.exists() else [])
