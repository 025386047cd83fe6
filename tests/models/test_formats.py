"""Configs of every family: what they translate to, and one line for whatever is wrong with them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nsa_models.config import NSAConfig
from nsa_models.errors import ModelError, NSAError
from nsa_models.formats import read_config, tensor_shapes, weight_files, weights_bytes

FLA = {
    "model_type": "nsa",
    "architectures": ["NSAForCausalLM"],
    "block_counts": 6,
    "block_size": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_linear_cross_entropy": False,
    "head_dim": 999,  # saved, but ignored until 2025-12-13
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 64,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "num_heads": 4,
    "num_hidden_layers": 1,
    "num_kv_heads": 2,
    "qkv_bias": True,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
    "vocab_size": 256,
    "window_size": 48,
}
LLAMA_NSA = {
    "model_type": "llama-nsa",
    "attention_bias": False,
    "block_counts": 16,
    "block_size": 16,
    "eos_token_id": [7, 8],
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
    "window_size": 128,
}
OURS = {"model_type": "nsa", "nsa_format": 1} | NSAConfig(97, 32, 2, 6, 2, 8, 48, eos_token_ids=(3,)).to_dict()
QUERIES = {
    "nsa": ("model.layers.0.attn.q_proj.weight", 4 * 24),
    "llama-nsa": ("model.layers.0.self_attn.q_proj.weight", 2048),
}


def write(directory: Path, values: object, generation: object = None) -> Path:
    """config.json and, since head_dim comes from it, a file with the query projection."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    kind = values.get("model_type") if isinstance(values, dict) else None
    if isinstance(kind, str) and kind in QUERIES:
        name, rows = QUERIES[kind]
        save_file({name: torch.zeros(rows, 1)}, directory / "model.safetensors")
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        read_config(directory)
    message = str(error.value)
    assert "\n" not in message and str(directory) in message
    return message


def test_fla(tmp_path) -> None:
    config = read_config(write(tmp_path / "m", FLA))
    assert (config.head_dim, config.intermediate_size) == (24, 256)  # 256 * ceil(64 * 4 * 2/3 / 256)
    v = config.variant
    assert (v.compress_block, v.compress_stride, v.select_block, v.select_count) == (16, 16, 16, 8)  # 6 rounded up
    assert (v.initial_blocks, v.local_blocks, v.window) == (1, 2, 48)
    assert (config.compress_kind, config.compress_rope, config.gate_bias) == ("mean", "before", False)
    assert (config.rope_theta, config.qkv_bias, config.tie_word_embeddings) == (50000.0, True, True)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_an_older_fla_forces_its_own_block_alone(tmp_path) -> None:
    old = {key: value for key, value in FLA.items() if key != "fuse_linear_cross_entropy"}
    config = read_config(write(tmp_path / "m", old))
    assert (config.initial_blocks, config.local_blocks) == (0, 1)
    config = read_config(write(tmp_path / "m", old | {"initial_blocks": 1, "local_blocks": 2}))
    assert (config.initial_blocks, config.local_blocks) == (1, 2)


@pytest.mark.parametrize(("window", "read"), [(48, 48), (0, 0), (None, 0), ("absent", 512)])
def test_flas_window(tmp_path, window, read) -> None:
    values = FLA | {"window_size": window}
    if window == "absent":
        del values["window_size"]
    assert read_config(write(tmp_path / "m", values)).window == read


def test_flas_null_key_heads_are_as_many_as_query_heads(tmp_path) -> None:
    assert read_config(write(tmp_path / "m", FLA | {"num_kv_heads": None})).num_kv_heads == 4


def test_llama_nsa(tmp_path) -> None:
    config = read_config(write(tmp_path / "m", LLAMA_NSA))
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size) == (32, 2, 64, 2048)
    assert (config.norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-5, 500000.0, 131072)
    v = config.variant
    assert (v.compress_block, v.select_block, v.select_count, v.window) == (16, 16, 16, 128)
    assert (v.initial_blocks, v.local_blocks, v.topk, v.topk_chunk) == (0, 1, "streamed", 16)
    assert config.eos_token_ids == (7, 8)


def test_generation_config_names_the_end(tmp_path) -> None:
    assert read_config(write(tmp_path / "m", LLAMA_NSA, {"eos_token_id": 5})).eos_token_ids == (5,)
    assert read_config(write(tmp_path / "m", LLAMA_NSA, {"eos_token_id": None})).eos_token_ids == (7, 8)


def test_our_own_round_trips(tmp_path) -> None:
    config = read_config(write(tmp_path / "m", OURS))
    assert {"model_type": "nsa", "nsa_format": 1} | json.loads(json.dumps(config.to_dict())) == json.loads(
        json.dumps(OURS)
    )


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (FLA, {"windw_size": 5}, "unknown key 'windw_size'; did you mean 'window_size'?"),
        (FLA, {"zzzzzz": 5}, "unknown key 'zzzzzz'; it may change what the model computes"),
        (FLA, {"hidden_act": "powlu"}, "hidden_act = 'powlu' is not supported"),
        (FLA, {"attnres_block_size": 4}, "attnres_block_size = 4 is not supported"),
        (FLA, {"hidden_size": "x"}, "hidden_size must be a number"),
        (FLA, {"num_heads": "x"}, "num_heads must be a number"),
        (FLA, {"num_heads": 0}, "num_heads must be positive"),
        (FLA, {"num_heads": 4.0}, "num_heads must be a number"),
        (FLA, {"num_heads": True}, "num_heads must be a number"),
        (FLA, {"num_hidden_layers": 10**9}, "layers are more than"),
        (FLA, {"vocab_size": None}, "vocab_size must be an integer, got None"),
        (FLA, {"block_counts": 0}, "block_counts must be positive"),
        (FLA, {"block_counts": 1}, "forced blocks (1 initial + 2 local) exceed select_count (1)"),
        (FLA, {"qkv_bias": "yes"}, "qkv_bias must be true or false, got 'yes'"),
        (FLA, {"rope_theta": -5}, "rope_theta must be positive"),
        (FLA, {"eos_token_id": "</s>"}, "eos_token_ids must be a list of token ids, got ('</s>',)"),
        (FLA, {"eos_token_id": {"a": 1}}, "eos_token_ids must be a list of token ids"),
        (FLA, {"eos_token_id": [1, None]}, "eos_token_ids must be a list of token ids"),
        (FLA, {"model_type": "mamba"}, "unknown architecture 'mamba'"),
        (FLA, {"model_type": ["nsa"]}, "no model_type"),
        (FLA, {"model_type": "llama"}, "nsa convert"),
        (LLAMA_NSA, {"rope_scaling": 5}, "rope_scaling must be an object, got 5"),
        (
            LLAMA_NSA,
            {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
            "rope_scaling 'longrope' is not supported",
        ),
        (LLAMA_NSA, {"rope_scaling": {"rope_type": "yarn"}}, "missing factor"),
        (LLAMA_NSA, {"rope_scaling": {"rope_type": "yarn", "factor": "big"}}, "factor must be a number"),
        (
            LLAMA_NSA,
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1}},
            "rope_scaling 'mscale' is not supported",
        ),
        (LLAMA_NSA, {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}}, "beta_fast must be a number"),
        (LLAMA_NSA, {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "of at least 1"),
        (LLAMA_NSA, {"rope_parameters": [1]}, "rope_parameters must be an object"),
        (LLAMA_NSA, {"attention_bias": True}, "attention_bias = True is not supported"),
        (OURS, {"nsa_format": 2}, "nsa_format 2 is not 1"),
        (OURS, {"windw": 2}, "unknown key 'windw'; did you mean 'window'?"),
        (OURS, {"head_dim": 8.5}, "head_dim must be an integer, got 8.5"),
        (OURS, {"window": "wide"}, "window must be an integer, got 'wide'"),
        (OURS, {"intermediate_size": 0}, "intermediate_size must be positive"),
        (OURS, {"norm_eps": "x"}, "norm_eps must be a number, got 'x'"),
        (OURS, {"rope_scaling": 5}, "rope_scaling must be an object, got 5"),
        (OURS, {"rope_scaling": {"factor": 2}}, "original_max_position_embeddings"),
        (OURS, {"eos_token_ids": 5}, "eos_token_ids must be a list of token ids, got 5"),
    ],
)
def test_wrong_configs_are_one_line(tmp_path, base: dict, change: dict, words: str) -> None:
    assert words in refused(write(tmp_path / "m", base | change))


@pytest.mark.parametrize("base", [FLA, LLAMA_NSA, OURS])
def test_missing_keys_are_named(tmp_path, base: dict) -> None:
    for key in ("hidden_size", "vocab_size", "num_hidden_layers"):
        assert key in refused(write(tmp_path / "m", {k: v for k, v in base.items() if k != key}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "not a JSON object"),
        (b"5", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_config_that_is_no_object(tmp_path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert words in refused(tmp_path)


def test_no_config(tmp_path) -> None:
    assert "No such file" in refused(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SCALING = ("rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "low_freq_factor", "kind")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_config_of_any_kind_raises_anything_else(tmp_path_factory, data) -> None:
    values = copy.deepcopy(data.draw(st.sampled_from([FLA, LLAMA_NSA, OURS])))
    for key in data.draw(st.lists(st.sampled_from(sorted(values) + ["rope_scaling", "rope_parameters"]), max_size=3)):
        values[key] = data.draw(JSON | st.dictionaries(st.sampled_from(SCALING), JSON | st.just("yarn")), key)
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), max_size=2)):
        values.pop(key, None)
    directory = write(tmp_path_factory.getbasetemp() / "mutated", values, data.draw(st.none() | JSON, "generation"))
    try:
        config = read_config(directory)
    except NSAError as error:
        assert "\n" not in str(error).replace("\\n", "")
    else:
        assert NSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (directory / "generation_config.json").unlink(missing_ok=True)


class TestWeightFiles:
    def test_shards(self, tmp_path) -> None:
        save_file({"a": torch.zeros(2, 3)}, tmp_path / "one.safetensors")
        save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
        index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert [f.name for f in weight_files(tmp_path)] == ["one.safetensors", "two.safetensors"]
        assert tensor_shapes(tmp_path) == {"a": (2, 3), "b": (4,)}
        assert weights_bytes(tmp_path) == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
        (tmp_path / "two.safetensors").unlink()
        with pytest.raises(ModelError, match=r"two\.safetensors: no such file; the checkpoint is incomplete"):
            weight_files(tmp_path)

    @pytest.mark.parametrize("shards", [None, {}, [], {"a": 5}, "x"])
    def test_an_index_that_maps_nothing(self, tmp_path, shards) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(ModelError, match="no weight_map"):
            weight_files(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"GGUF" * 20])
    def test_not_safetensors(self, tmp_path, content: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="truncated or not safetensors"):
            tensor_shapes(tmp_path)
