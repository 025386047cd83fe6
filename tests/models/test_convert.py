"""Dense llama and qwen2 checkpoints, directories and GGUF files, become NSA ones that answer as they did."""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from nsa_models import Cache, load_model, load_tokenizer, prefill
from nsa_models.config import NSAConfig, RopeScaling
from nsa_models.convert import convert
from nsa_models.dense import read_dense
from nsa_models.errors import ModelError
from nsa_models.formats import FORMATS, translate
from nsa_models.rope import Rope

H, HQ, HKV, D, I, V, L = 48, 6, 2, 8, 64, 320, 2
DENSE = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": HQ,
    "num_key_value_heads": HKV,
    "intermediate_size": I,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
CONFIGS = {
    "llama": DENSE | {"model_type": "llama"},
    "llama-tied": DENSE | {"model_type": "llama", "tie_word_embeddings": True, "head_dim": D},
    "llama-no-groups": {k: v for k, v in DENSE.items() if k != "num_key_value_heads"} | {"model_type": "llama"},
    "qwen2": DENSE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1},
    "qwen2-yarn": DENSE
    | {
        "model_type": "qwen2",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "llama-3": DENSE
    | {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "llama-linear": DENSE
    | {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
}
del CONFIGS["llama-linear"]["rope_theta"]


def weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face's names."""
    g = torch.Generator().manual_seed(seed)
    kv = config.get("num_key_value_heads", HQ) * D
    shapes = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, H)
    for i in range(L):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (H,), at + "post_attention_layernorm.weight": (H,)}
        shapes |= {at + "self_attn.q_proj.weight": (HQ * D, H), at + "self_attn.o_proj.weight": (H, HQ * D)}
        shapes |= {at + f"self_attn.{n}_proj.weight": (kv, H) for n in "kv"}
        shapes |= {at + f"mlp.{n}_proj.weight": (I, H) for n in ("gate", "up")} | {at + "mlp.down_proj.weight": (H, I)}
        if config["model_type"] == "qwen2":
            shapes |= {at + "self_attn.q_proj.bias": (HQ * D,)} | {at + f"self_attn.{n}_proj.bias": (kv,) for n in "kv"}
    return {n: torch.randn(s, generator=g) * (0.3 if len(s) == 2 else 0.2) + ("norm" in n) for n, s in shapes.items()}


def inverse_frequencies(config: dict) -> tuple[torch.Tensor, float]:
    """Rotary frequencies and the factor on cos and sin, as Hugging Face's modeling_rope_utils defines them."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or scaling["rope_theta"]
    plain = [theta ** (-2 * i / D) for i in range(D // 2)]
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind is None:
        return torch.tensor(plain, dtype=torch.float64), 1.0
    out = []
    for i, f in enumerate(plain):
        if kind == "linear":
            out.append(f / factor)
        elif kind == "llama3":
            old, wavelength = scaling["original_max_position_embeddings"], 2 * math.pi / f
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength < old / high:
                out.append(f)
            elif wavelength > old / low:
                out.append(f / factor)
            else:
                smooth = (old / wavelength - low) / (high - low)
                out.append((1 - smooth) * f / factor + smooth * f)
        else:
            old = scaling["original_max_position_embeddings"]
            low, high = (D * math.log(old / (b * 2 * math.pi)) / (2 * math.log(theta)) for b in (32, 1))
            low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            out.append(f / factor * ramp + f * (1 - ramp))
    return torch.tensor(out, dtype=torch.float64), 0.1 * math.log(factor) + 1 if kind == "yarn" else 1.0


def dense_logits(config: dict, w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """A llama or qwen2 in plain PyTorch, float64, written from its definition: (T, V)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    T, kv = len(ids), config.get("num_key_value_heads", HQ)
    frequency, magnitude = inverse_frequencies(config)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency).repeat(1, 2)
    cos, sin = angle.cos() * magnitude, angle.sin() * magnitude

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * w[name]

    def heads(x: torch.Tensor, name: str, count: int) -> torch.Tensor:
        y = x @ w[name + ".weight"].T + w.get(name + ".bias", 0)
        return y.view(T, count, D).transpose(0, 1)

    def rope(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    for i in range(L):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q = rope(heads(h, at + "self_attn.q_proj", HQ))
        k, v = rope(heads(h, at + "self_attn.k_proj", kv)), heads(h, at + "self_attn.v_proj", kv)
        k, v = (t.repeat_interleave(HQ // kv, 0) for t in (k, v))
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + o.transpose(0, 1).reshape(T, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gated = functional.silu(h @ w[at + "mlp.gate_proj.weight"].T) * (h @ w[at + "mlp.up_proj.weight"].T)
        x = x + gated @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.fixture
def directory(tmp_path, tiny_tokenizer: bytes):
    """directory(config, tensors) -> a dense checkpoint as Hugging Face writes it."""

    def write(config: dict, tensors: dict | None = None) -> Path:
        target = tmp_path / "dense"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        (target / "tokenizer.json").write_bytes(tiny_tokenizer)
        (target / "chat_template.jinja").write_text("{{ messages[0].content }}")
        save_file(weights(config) if tensors is None else tensors, target / "model.safetensors")
        return target

    return write


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_converted_model_answers_as_the_dense_one(config: dict, directory, tmp_path) -> None:
    target = tmp_path / "nsa"
    made = convert(directory(config), target, 4096, "float32", select_count=5, window=40)
    assert (made.select_count, made.window, made.gate_bias, made.norm_eps) == (5, 40, True, 1e-5)
    ids = torch.randint(0, V, (5 * 64,), generator=torch.Generator().manual_seed(1))
    expected = dense_logits(config, weights(config), ids)
    assert relative(load_model(target, "cpu", torch.float32)(ids), expected) < 1e-3
    assert load_tokenizer(target).has_chat_template


def test_beyond_n_blocks_it_leaves_blocks_out(directory, tmp_path) -> None:
    config = CONFIGS["llama"]
    convert(directory(config), tmp_path / "nsa", 4096, "float32", select_count=5)
    ids = torch.randint(0, V, (8 * 64,), generator=torch.Generator().manual_seed(1))
    model = load_model(tmp_path / "nsa", "cpu", torch.float32)
    expected = dense_logits(config, weights(config), ids)
    assert relative(model(ids)[6 * 64 :], expected[6 * 64 :]) > 1e-2
    dense = prefill(model, ids, Cache(model.config, len(ids), dtype=torch.float32), dense=True)
    assert relative(dense, expected[-1]) < 1e-3


@pytest.mark.parametrize("block", [32, 24])  # 24: 1/24 is no float
@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_learned_compression_starts_as_the_mean(kind: str, block: int, directory, tmp_path) -> None:
    """Also where the compressed values are not gated off, and not every block is selected."""
    source = directory(CONFIGS["llama"])
    config, window = CONFIGS["llama"], dict(select_count=4, compress_block=block, compress_stride=8)
    ids = torch.randint(0, config["vocab_size"], (500,), generator=torch.Generator().manual_seed(1))
    logits = {}
    for name in ("mean", kind):
        convert(source, tmp_path / name, 4096, "float32", compress_kind=name, compress_positions=True, **window)
        model = load_model(tmp_path / name, "cpu", torch.float32)
        for layer in model.model.layers:
            layer.attn.g_proj.bias.zero_()
        logits[name] = model(ids)
    assert relative(logits[kind], logits["mean"]) < 1e-4


def test_a_perceptron_has_no_such_start(directory, tmp_path) -> None:
    with pytest.raises(ModelError, match="compress_kind mlp cannot start as the mean") as error:
        convert(directory(CONFIGS["llama"]), tmp_path / "nsa", 4096, "int8", compress_kind="mlp")
    assert "\n" not in str(error.value) and not (tmp_path / "nsa").exists()


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_narrow_types_stay_near(dtype: str, limit: float, directory, tmp_path) -> None:
    config = CONFIGS["qwen2"]
    convert(directory(config), tmp_path / "nsa", 4096, dtype)
    ids = torch.arange(200) % V
    expected = dense_logits(config, weights(config), ids)
    got = load_model(tmp_path / "nsa", "cpu", torch.float32)(ids)
    assert (got - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("context", [4096, 4097, 131072])
def test_a_longer_context_has_positions_in_chunks(context: int, directory, tmp_path) -> None:
    made = convert(directory(CONFIGS["llama"]), tmp_path / "nsa", context, "int8")
    assert made.max_position_embeddings == context
    chunks = RopeScaling(context / 4096, 4096, kind="dual_chunk", chunk=1024)
    assert made.rope_scaling == (chunks if context > 4096 else None)
    assert made.rope_factor(context) == 1.0


def test_chunks_of_positions_may_be_chosen(directory, tmp_path) -> None:
    dense = directory(CONFIGS["llama"])
    made = convert(dense, tmp_path / "nsa", 16384, "int8", chunk=512)
    assert made.rope_scaling == RopeScaling(4.0, 4096, kind="dual_chunk", chunk=512)
    assert load_model(tmp_path / "nsa", "cpu", torch.float32).config == made
    for chunk, said in ((500, "must be a multiple of select_block"), (448, "no shorter than window")):
        with pytest.raises(ModelError, match=said):
            convert(dense, tmp_path / "out", 16384, "int8", chunk=chunk)


def test_learned_compression_of_rotated_keys_cannot_be_turned(directory, tmp_path) -> None:
    dense, out = directory(CONFIGS["llama"]), tmp_path / "nsa"
    with pytest.raises(ModelError, match="learned compression needs compress_rope after or none"):
        convert(dense, out, 16384, "float32", compress_kind="softmax")
    assert convert(dense, out, 16384, "float32", compress_kind="softmax", compress_rope="after").position_chunk == 1024


def test_a_source_with_its_own_scaling_is_not_scaled_twice(directory, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"has its own \(yarn\); give at most --context 4096"):
        convert(directory(CONFIGS["qwen2-yarn"]), tmp_path / "nsa", 8192, "int8")


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("name", ["qwen2-yarn", "llama-3", "llama-linear"])
def test_scaled_frequencies(name: str, head_dim: int, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "D", head_dim)
    config = CONFIGS[name] | {"head_dim": head_dim}
    ours = translate(FORMATS[config["model_type"]], config, Path("here"))
    rope = Rope(ours, ours.rope_factor(100))
    frequency, magnitude = inverse_frequencies(config)
    torch.testing.assert_close(rope.frequency, frequency, rtol=1e-12, atol=0)
    assert rope.magnitude == pytest.approx(magnitude)
    cos, sin = rope.angles(torch.tensor([131071]), torch.float64)
    torch.testing.assert_close(cos[0, 0], (131071 * frequency).cos() * magnitude)
    torch.testing.assert_close(sin[0, 0], (131071 * frequency).sin() * magnitude)


class TestWrongSources:
    def refused(self, path: Path) -> str:
        with pytest.raises(ModelError) as error:
            read_dense(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            ("model.layers.0.self_attn.o_proj.bias", torch.zeros(H), "is not part of a llama model"),
            ("model.norm.weight", None, "no tensor for model.norm.weight"),
            ("model.norm.weight", torch.zeros(H + 1), f"has shape [{H + 1}], the config says [{H}]"),
        ],
    )
    def test_tensors(self, directory, name: str, tensor, words: str) -> None:
        tensors = weights(CONFIGS["llama"]) | {name: tensor}
        assert words in self.refused(directory(CONFIGS["llama"], {n: t for n, t in tensors.items() if t is not None}))

    def test_rotary_buffers_of_old_checkpoints_are_left_out(self, directory) -> None:
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        read_dense(directory(CONFIGS["llama"], weights(CONFIGS["llama"]) | extra))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
            ({"mlp_bias": True}, "mlp_bias = True is not supported"),
            ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
            ({"num_attention_heads": None}, "missing num_attention_heads"),
            ({"quantization_config": {}}, "unknown key 'quantization_config'"),
            ({"model_type": "mistral"}, "unknown architecture 'mistral'"),
        ],
    )
    def test_configs(self, directory, change: dict, words: str) -> None:
        assert words in self.refused(directory(CONFIGS["llama"] | change, weights(CONFIGS["llama"])))

    def test_no_tokenizer(self, directory) -> None:
        source = directory(CONFIGS["llama"])
        (source / "tokenizer.json").unlink()
        assert "no tokenizer.json beside the weights" in self.refused(source)

    def test_an_nsa_checkpoint(self, tiny_checkpoint) -> None:
        assert "an NSA checkpoint already" in self.refused(tiny_checkpoint)

    def test_nothing_there(self, tmp_path) -> None:
        assert "no such checkpoint" in self.refused(tmp_path / "nowhere")

    def test_an_existing_target(self, directory, tmp_path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(ModelError, match="exists; remove it or name another place"):
            convert(directory(CONFIGS["llama"]), tmp_path / "out", 4096, "int8")

    def test_an_impossible_variant(self, directory, tmp_path) -> None:
        with pytest.raises(ModelError, match="must be a multiple of compress_stride"):
            convert(directory(CONFIGS["llama"]), tmp_path / "out", 4096, "int8", compress_stride=7)
        assert not (tmp_path / "out").exists()


# GGUF

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant:"
)


def gguf_name(name: str) -> str:
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers.", "blk.")


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf: half-split rows of q and k become interleaved ones."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


@pytest.fixture
def make_gguf(tmp_path, tiny_tokenizer: bytes):
    """make_gguf(config, pre=..., drop=(), **fields) -> a file as llama.cpp's converter writes it."""

    def write(config: dict, pre: str = "smollm", drop: tuple = (), tensors: dict | None = None, **fields) -> Path:
        arch, path = config["model_type"], tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, arch)
        values = json.loads(tiny_tokenizer)
        tokens = [t for t, _ in sorted(values["model"]["vocab"].items(), key=lambda item: item[1])]
        tokens += [f"[PAD{i}]" for i in range(len(tokens), V)]
        control = {t["content"] for t in values["added_tokens"]}
        steps = {
            "block_count": lambda: writer.add_block_count(L),
            "context_length": lambda: writer.add_context_length(4096),
            "embedding_length": lambda: writer.add_embedding_length(H),
            "feed_forward_length": lambda: writer.add_feed_forward_length(I),
            "head_count": lambda: writer.add_head_count(HQ),
            "head_count_kv": lambda: writer.add_head_count_kv(HKV),
            "rms": lambda: writer.add_layer_norm_rms_eps(1e-5),
            "rope": lambda: writer.add_rope_freq_base(10000.0),
            "model": lambda: writer.add_tokenizer_model("gpt2"),
            "pre": lambda: writer.add_tokenizer_pre(pre),
            "tokens": lambda: writer.add_token_list(tokens),
            "types": lambda: writer.add_token_types([3 if t in control else 5 if "[PAD" in t else 1 for t in tokens]),
            "merges": lambda: writer.add_token_merges([" ".join(m) for m in values["model"]["merges"]]),
            "eos": lambda: writer.add_eos_token_id(tokens.index("<|im_end|>")),
            "bos": lambda: writer.add_bos_token_id(tokens.index("<|im_start|>")),
            "template": lambda: writer.add_chat_template(CHATML),
        }
        for name, step in steps.items():
            if name not in drop:
                step()
        for key, value in fields.items():
            if isinstance(value, str):
                writer.add_string(key.replace("__", "."), value)
            elif isinstance(value, int):
                writer.add_uint32(key.replace("__", "."), value)
            elif isinstance(value, list):
                writer.add_array(key.replace("__", "."), value)
        for name, tensor in (weights(config) if tensors is None else tensors).items():
            data = tensor.numpy()
            if arch == "llama" and ".q_proj" in name:
                data = permuted(data, HQ)
            elif arch == "llama" and ".k_proj" in name:
                data = permuted(data, HKV)
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_a_gguf_holds_the_same_tensors(name: str, make_gguf, directory) -> None:
    config = CONFIGS[name]
    from_gguf, from_directory = read_dense(make_gguf(config)), read_dense(directory(config))
    assert from_gguf.tensors.keys() == from_directory.tensors.keys()
    for tensor in from_gguf.tensors:
        assert torch.equal(from_gguf.tensors[tensor], from_directory.tensors[tensor]), tensor
    ours, theirs = from_gguf.config.to_dict(), from_directory.config.to_dict()
    differ = {"bos_token_id", "eos_token_ids"}  # those of the test's tokenizer
    assert {k: v for k, v in ours.items() if k not in differ} == {k: v for k, v in theirs.items() if k not in differ}


def test_a_quantized_gguf_is_expanded(tmp_path) -> None:
    path = tmp_path / "q.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    wide = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    packed = gguf.quants.quantize(wide.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("x", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from nsa_models.dense import _dequantize

    (tensor,) = gguf.GGUFReader(path).tensors
    got = _dequantize(tensor, path)
    assert got.shape == (4, 64) and (got - wide).abs().max() < wide.abs().max() / 127


def test_a_ggufs_tokenizer(make_gguf, tmp_path, tiny_tokenizer: bytes) -> None:
    convert(make_gguf(CONFIGS["qwen2"]), tmp_path / "nsa", 4096, "int8")
    tokenizer = load_tokenizer(tmp_path / "nsa")
    text = "The quick brown fox 12345 <|im_end|> naïve 漢字 🦊\n\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    end = tokenizer._control.token_to_id("<|im_end|>")
    assert tokenizer.eos_ids == (end,) and end not in tokenizer.encode(text)
    prompt = tokenizer.prompt("Why?")
    assert tokenizer._control.decode(prompt.before + prompt.after, skip_special_tokens=False) == (
        "<|im_start|>user\n\n\nWhy?<|im_end|>\n<|im_start|>assistant:"
    )
    from tokenizers import Tokenizer as Backend

    same = Backend.from_str(tiny_tokenizer.decode())
    words = "the quick brown fox jumps over the lazy dog"
    assert tokenizer.encode(words) == same.encode(words, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "I'll pay 1234 now", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " now"]),
        ("qwen2", "I'LL pay 1234 now", ["I", "'LL", " pay", " ", "1", "2", "3", "4", " now"]),
        ("llama-bpe", "I'LL pay 1234 now", ["I", "'LL", " pay", " ", "123", "4", " now"]),
        ("qwen2", "a.b()\n\n  x", ["a", ".b", "()\n\n", " ", " x"]),
        ("llama-bpe", "été/漢字\r\n", ["été", "/漢字", "\r\n"]),
    ],
)
def test_pre_tokenizers_of_ggufs(pre: str, text: str, words: list[str], make_gguf) -> None:
    from tokenizers import Tokenizer as Backend

    raw = read_dense(make_gguf(CONFIGS["qwen2"], pre=pre)).files["tokenizer.json"]
    pieces = Backend.from_str(raw.decode()).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in pieces] == words


def test_qwens_tokenizer_composes_characters_and_llamas_takes_whole_words(make_gguf) -> None:
    from tokenizers import Tokenizer as Backend

    qwen = Backend.from_str(read_dense(make_gguf(CONFIGS["qwen2"], pre="qwen2")).files["tokenizer.json"].decode())
    assert qwen.normalizer.normalize_str("e\u0301") == "é"
    files = read_dense(make_gguf(CONFIGS["qwen2"], pre="llama-bpe", drop=("template",))).files
    llama = json.loads(files["tokenizer.json"])
    assert llama["normalizer"] is None and llama["model"]["ignore_merges"] is True
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["add_bos_token"] is True and settings["chat_template"] is None


class TestWrongGgufs:
    def refused(self, path: Path) -> str:
        with pytest.raises(ModelError) as error:
            read_dense(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize(
        "content", [b"", b"GGUF", b"\0" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 40, b"text, not a model"]
    )
    def test_garbage(self, tmp_path, content: bytes) -> None:
        (tmp_path / "x.gguf").write_bytes(content)
        assert "not a GGUF file, or truncated" in self.refused(tmp_path / "x.gguf")

    @pytest.mark.parametrize("part", [0.01, 0.1, 0.3, 0.6, 0.99])
    def test_truncated(self, make_gguf, part: float) -> None:
        path = make_gguf(CONFIGS["llama"])
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        assert "not a GGUF file, or truncated" in self.refused(path)

    @pytest.mark.parametrize(
        ("drop", "words"),
        [
            ("head_count", "no llama.attention.head_count"),
            ("embedding_length", "no llama.embedding_length"),
            ("rms", "no llama.attention.layer_norm_rms_epsilon"),
            ("tokens", "tokenizer.ggml.tokens"),
            ("types", "tokenizer.ggml.token_type"),
            ("merges", "tokenizer.ggml.merges"),
            ("model", "tokenizer None/smollm is not supported"),
        ],
    )
    def test_missing_metadata(self, make_gguf, drop: str, words: str) -> None:
        assert words in self.refused(make_gguf(CONFIGS["llama"], drop=(drop,)))

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"llama__attention__key_length": 9}, "head_dim must be even"),
            ({"llama__rope__dimension_count": 4}, "rotary dimensions differ from head_dim"),
            ({"llama__rope__scaling__type": "yarn"}, "scaled RoPE in a GGUF is not supported"),
            (
                {"tokenizer__ggml__pre": "deepseek-llm", "drop": ("pre",)},
                "tokenizer gpt2/deepseek-llm is not supported",
            ),
            ({"tokenizer__ggml__eos_token_id": 99999, "drop": ("eos",)}, "the metadata cannot be used"),
            ({"llama__attention__head_count": 0, "drop": ("head_count",)}, "the metadata cannot be used"),
            ({"llama__attention__head_count": [6, 6], "drop": ("head_count",)}, "the metadata cannot be used"),
            ({"llama__attention__head_count": "six", "drop": ("head_count",)}, "the metadata cannot be used"),
            ({"tokenizer__ggml__merges": ["nowhere there"], "drop": ("merges",)}, "merges do not fit its tokens"),
        ],
    )
    def test_metadata_that_cannot_be(self, make_gguf, fields: dict, words: str) -> None:
        assert words in self.refused(make_gguf(CONFIGS["llama"], **fields))

    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            ("rope_freqs.weight", torch.ones(4), "scaled RoPE in a GGUF is not supported"),
            ("blk.0.ffn_gate_exps.weight", torch.ones(4, 4), "is not part of a llama or qwen2 model"),
            ("model.norm.weight", None, "no tensor for model.norm.weight"),
            ("model.layers.0.self_attn.q_proj.weight", torch.ones(12, H), "has shape"),
        ],
    )
    def test_tensors(self, make_gguf, name: str, tensor, words: str) -> None:
        tensors = weights(CONFIGS["llama"]) | {name: tensor}
        path = make_gguf(CONFIGS["llama"], tensors={n: t for n, t in tensors.items() if t is not None})
        assert words in self.refused(path)

    def test_another_architecture(self, make_gguf) -> None:
        assert "unknown architecture 'phi3'" in self.refused(make_gguf(CONFIGS["llama"] | {"model_type": "phi3"}))


def test_dense_configs_are_not_run_as_they_are(directory) -> None:
    with pytest.raises(ModelError, match=r"a dense llama checkpoint, not an NSA one; convert it first: nsa convert"):
        load_model(directory(CONFIGS["llama"]))


def test_rope_scaling_of_configs() -> None:
    def read(**values) -> RopeScaling | None:
        return translate(FORMATS["llama"], CONFIGS["llama"] | values, Path("here")).rope_scaling

    assert read() is read(rope_scaling=None) is read(rope_scaling={"rope_type": "default"}) is None
    assert read(rope_scaling={"type": "linear", "factor": 2}) == RopeScaling(2.0, 4096, kind="linear")
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 2}
    assert read(rope_scaling=yarn) == RopeScaling(4.0, 1024, 16, 2, kind="yarn")
    assert isinstance(translate(FORMATS["llama"], CONFIGS["llama"], Path("here")), NSAConfig)
