"""Checkpoints on disk: fla's own, llama-nsa's names, round trips, and one line for whatever does not fit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_kernels import cpu, dispatch, native, reference
from nsa_models import Cache, NSAConfig, load_model, prefill, save_model
from nsa_models.checkpoint import save_checkpoint
from nsa_models.convert import store
from nsa_models.errors import ModelError, NSAError
from nsa_models.training.student import float_weights
from nsa_models.transformer import NSAModel, parameter_shapes

ORACLE = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "fla_nsa_tiny"
CONFIG = NSAConfig(97, 32, 2, 6, 2, 8, 48, gate_bias=True, select_count=4, window=32, eos_token_ids=(3,))
LAYER = "model.layers.1."


def tensors_of(config: NSAConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) * 0.3 for name, shape in parameter_shapes(config).items()}


@pytest.fixture
def saved(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model", CONFIG, tensors_of(CONFIG))
    return tmp_path / "model"


def refused(directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(directory, "cpu", torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the weights with some tensors changed, added or (None) left out; `__` in a name stands for a dot."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return load_file(ORACLE / "expected.safetensors")


@pytest.mark.skipif(not ORACLE.exists(), reason="no oracle files beside the checkout (../shared/oracles)")
class TestFla:
    """A checkpoint as flash-linear-attention wrote it, and the logits that its own kernels gave."""

    @pytest.mark.parametrize("path", [reference, cpu, native], ids=["reference", "cpu", "native"])
    @pytest.mark.parametrize("chunk", [1000, 50])
    def test_logits(self, path, chunk: int, expected, monkeypatch) -> None:
        if path is native and not native.supports(torch.empty(1, 1, 2)):
            pytest.skip("no C compiler")
        calls = []

        def attend(*arguments, **options):
            calls.append(path)
            return path.nsa_attention(*arguments, **options)

        monkeypatch.setattr("nsa_kernels.nsa_attention", attend, raising=False)
        model = load_model(ORACLE, "cpu", torch.float32)
        ids, logits = expected["input_ids"].long(), expected["logits"]
        cache = Cache(model.config, len(ids), dtype=torch.float32)
        got = []
        for start in range(0, len(ids), chunk):
            got.append(model.logits(model.advance(ids[start : start + chunk], cache)))
        assert ((torch.cat(got) - logits).abs().max() / logits.abs().max()).item() < 1e-4
        assert len(calls) == 2 * len(got)

    def test_float64_is_closer_still(self, expected) -> None:
        model = load_model(ORACLE, "cpu", torch.float64)
        logits = model(expected["input_ids"].long())
        assert ((logits - expected["logits"]).abs().max() / logits.abs().max()).item() < 1e-5

    def test_forced_blocks_matter(self, expected, tmp_path) -> None:
        """Without the key that tells its age the same weights are an older fla's, which forced the own block alone."""
        shutil.copytree(ORACLE, tmp_path / "old")
        config = json.loads((ORACLE / "config.json").read_text())
        del config["fuse_linear_cross_entropy"]
        (tmp_path / "old" / "config.json").write_text(json.dumps(config))
        old = load_model(tmp_path / "old", "cpu", torch.float32)
        assert (old.config.initial_blocks, old.config.local_blocks) == (0, 1)
        difference = (old(expected["input_ids"].long()) - expected["logits"]).abs().amax(-1)
        assert difference[:128].max() < 1e-4 < difference[200:].max()  # 8 blocks of 16 hold the first 128 tokens

    def test_it_round_trips_in_our_format(self, expected, tmp_path) -> None:
        model = load_model(ORACLE, "cpu", torch.float32)
        save_model(model, tmp_path / "ours")
        ids = expected["input_ids"].long()
        assert torch.equal(load_model(tmp_path / "ours", "cpu", torch.float32)(ids), model(ids))


def test_dispatch_is_what_the_model_calls() -> None:
    """TestFla replaces this attribute: the model must not have bound another."""
    import nsa_kernels

    assert nsa_kernels.nsa_attention is dispatch.nsa_attention


def test_llama_nsa_names(tmp_path) -> None:
    """The same tensors under Llama's names are the same model."""
    config = replace(
        CONFIG, gate_bias=False, tie_word_embeddings=True, compress_block=16, compress_stride=16, select_block=16
    )
    config = replace(config, initial_blocks=0, local_blocks=1, topk="streamed", topk_chunk=4)
    tensors = tensors_of(config)
    values = {
        "model_type": "llama-nsa",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "block_size": 16,
        "block_counts": 4,
        "window_size": 32,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "eos_token_id": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    renamed = {"embeddings": "embed_tokens", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    theirs = {
        ".".join(renamed.get(p, "self_attn" if p == "attn" else p) for p in name.split(".")): tensor
        for name, tensor in tensors.items()
    }
    assert {"model.embed_tokens.weight", LAYER + "self_attn.g_proj.weight"} < theirs.keys()
    save_file(theirs, tmp_path / "model.safetensors")
    model = load_model(tmp_path, "cpu", torch.float32)
    assert model.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_round_trip(tmp_path, dtype: str, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied, branch_kv=True, compress_kind="mlp", compress_positions=True)
    tensors = store(tensors_of(config), dtype)
    save_checkpoint(tmp_path / "a", config, tensors, {"tokenizer.json": b"{}"})
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == b"{}"
    for compute in (torch.float32, torch.bfloat16):
        model = load_model(tmp_path / "a", "cpu", compute)
        assert model.config == config and model.dtype == compute
        save_model(model, tmp_path / f"again-{compute}")
        again = load_file(tmp_path / f"again-{compute}" / "model.safetensors")
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            exact = tensor.dtype != torch.float32 or compute == torch.float32 or "_scale" in name
            assert torch.equal(again[name].float(), tensor.float() if exact else tensor.bfloat16().float()), name


def test_shards(saved) -> None:
    tensors = load_file(saved / "model.safetensors")
    whole = load_model(saved, "cpu", torch.float32)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, saved / file)
    (saved / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = torch.arange(80) % 97
    sharded = load_model(saved, "cpu", torch.float32)
    assert torch.equal(sharded(ids), whole(ids)) and sharded.fingerprint != whole.fingerprint != ""
    save_file({}, saved / "b.safetensors")
    assert "is missing" in refused(saved)


def test_weights_are_readable_by_whom_the_config_is(saved) -> None:
    modes = {file.name: file.stat().st_mode for file in saved.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_fingerprint_is_of_weights_and_config(saved) -> None:
    first = load_model(saved).fingerprint
    assert load_model(saved).fingerprint == first
    change(saved, **{"model.norm.weight": torch.ones(32)})
    second = load_model(saved).fingerprint
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(values | {"window": 33}))
    assert len({first, second, load_model(saved).fingerprint}) == 3


def test_a_tied_table_may_be_stored_twice(tmp_path) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)
    save_checkpoint(tmp_path / "m", config, tensors_of(config))
    change(tmp_path / "m", lm_head__weight=torch.zeros(97, 32))
    assert load_model(tmp_path / "m").lm_head is None


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({LAYER + "attn.q_proj.weight": None}, "attn.q_proj.weight is missing (1 of"),
            ({LAYER + "extra": torch.zeros(1)}, f"tensor {LAYER}extra is not part of this architecture"),
            ({"lm_head.weight_scale": torch.ones(5)}, "tensor lm_head.weight_scale is not part of this architecture"),
            ({LAYER + "mlp_norm.weight": torch.ones(31)}, "has shape [31], the config says [32]"),
            ({"model.embeddings.weight": torch.ones(96, 32)}, "has shape [96, 32], the config says [97, 32]"),
            ({"lm_head.weight": torch.ones(97, 32).char()}, "lm_head.weight is int8 without its weight_scale"),
            ({"model.norm.weight": torch.ones(32).char()}, "model.norm.weight is int8 without its weight_scale"),
            ({"lm_head.weight_scale": torch.ones(97)}, "lm_head.weight has scales, but is not int8"),
            ({"model.norm.weight": torch.ones(32).int()}, "model.norm.weight is stored as int32"),
            ({"model.norm.weight": torch.ones(32).bool()}, "model.norm.weight is stored as bool"),
        ],
    )
    def test_tensors(self, saved, changes: dict, words: str) -> None:
        change(saved, **changes)
        assert words in refused(saved)

    def test_an_int8_norm_is_refused_even_with_scales(self, saved) -> None:
        change(saved, **{"model.norm.weight": torch.ones(32).char(), "model.norm.weight_scale": torch.ones(32)})
        assert "model.norm.weight may not be int8" in refused(saved)

    def test_another_vocabulary(self, saved) -> None:
        values = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(values | {"vocab_size": 98}))
        assert "the config says [98, 32]" in refused(saved)

    @pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, saved, part: float) -> None:
        file = saved / "model.safetensors"
        os.truncate(file, int(file.stat().st_size * part))
        assert "truncated or not safetensors" in refused(saved)

    def test_no_weights(self, saved) -> None:
        (saved / "model.safetensors").unlink()
        assert "no such file; the checkpoint is incomplete" in refused(saved)

    def test_an_unknown_architecture_and_an_unknown_key(self, saved) -> None:
        values = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(values | {"select_cuont": 8}))
        assert "unknown key 'select_cuont'; did you mean 'select_count'?" in refused(saved)
        (saved / "config.json").write_text(json.dumps(values | {"model_type": "mamba"}))
        assert "unknown architecture 'mamba'" in refused(saved)


class TestSave:
    def test_an_existing_directory_is_kept_unless_replaced(self, saved) -> None:
        before = (saved / "model.safetensors").read_bytes()
        with pytest.raises(ModelError, match="exists"):
            save_checkpoint(saved, CONFIG, tensors_of(CONFIG, 1))
        assert (saved / "model.safetensors").read_bytes() == before
        save_checkpoint(saved, CONFIG, tensors_of(CONFIG, 1), replace=True)
        assert (saved / "model.safetensors").read_bytes() != before
        assert [p.name for p in saved.parent.iterdir()] == [saved.name]

    def test_tensors_that_do_not_fit_are_not_written(self, tmp_path) -> None:
        tensors = tensors_of(CONFIG)
        del tensors["lm_head.weight"]
        with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
            save_checkpoint(tmp_path / "m", CONFIG, tensors)
        assert not list(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written(self, tmp_path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(NSAError, match="cannot write the checkpoint"):
            save_checkpoint(tmp_path / "file" / "m", CONFIG, tensors_of(CONFIG))

    @pytest.mark.parametrize("replacing", [False, True])
    def test_a_write_that_fails_leaves_nothing(self, tmp_path, saved, replacing: bool) -> None:
        """A full disk, by a limit on file sizes that the weights exceed and config.json does not."""
        target = saved if replacing else tmp_path / "new"
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        program = (
            "import resource, sys, torch\n"
            "from nsa_models import load_model\n"
            "from nsa_models.checkpoint import save_checkpoint\n"
            "from nsa_models.errors import ModelError, NSAError\n"
            "model = load_model(sys.argv[1], 'cpu', torch.float32)\n"
            "tensors = {name: t.clone() for name, t in model.state_dict().items()}\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
            "try:\n"
            "    save_checkpoint(sys.argv[2], model.config, tensors, replace=True)\n"
            "except NSAError as error:\n"
            "    assert not isinstance(error, ModelError)\n"
            "    print(error)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, str(saved), str(target)], capture_output=True, text=True, check=False
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert "cannot write the checkpoint" in run.stdout and run.stdout.count("\n") == 1
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert [p.name for p in tmp_path.iterdir()] == [saved.name]


def test_a_model_of_the_installed_checkpoint_answers_as_dense_attention_would(tmp_path) -> None:
    """The built-in model: gates that leave the selected branch alone, so that 1024 tokens are dense attention.

    Of its weights in float32: products with int8 ones are rounded to bfloat16, and gates of 8e-7 tip some over.
    """
    from nsa_cli.settings import resolve_model

    try:
        directory = resolve_model(None)
    except ModelError:
        pytest.skip("the built-in model is not installed (nsa models install)")
    stored = load_model(directory, "cpu", torch.float32)
    save_checkpoint(tmp_path / "float32", stored.config, float_weights(stored), {})
    model: NSAModel = load_model(tmp_path / "float32", "cpu", torch.float32)
    variant = model.config.variant
    tokens = min(1024, variant.select_count * variant.select_block)
    ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    sparse, dense = (
        prefill(model, ids, Cache(model.config, tokens, dtype=torch.float32), dense=how) for how in (False, True)
    )
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=2e-4)
