"""Dense llama and qwen2 checkpoints as sources: a safetensors directory or a GGUF file, under our parameter names."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nsa_models.config import NSAConfig
from nsa_models.errors import ModelError
from nsa_models.formats import FORMATS, format_of, open_weights, read_json, tensor_shapes, translate, weight_files

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class DenseSource:
    """A dense checkpoint read whole: `config` has NSA defaults, `tensors` are float32 under our names."""

    config: NSAConfig
    tensors: dict[str, Tensor]
    files: dict[str, bytes]  # tokenizer


def read_dense(path: str | Path) -> DenseSource:
    """A dense checkpoint: a directory with config.json and safetensors, or a .gguf file. Raises ModelError."""
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint; name a directory with config.json or a .gguf file")
    return _read_gguf(path)


def _read_directory(directory: Path) -> DenseSource:
    values = read_json(directory / "config.json")
    source = format_of(values, directory)
    if not source.dense:
        raise ModelError(f"{directory}: an NSA checkpoint already ({values['model_type']}); use it as it is")
    config = translate(source, values, directory)
    known = {source.file_name(name): name for name in dense_shapes(config)}
    if config.tie_word_embeddings:
        known.pop("lm_head.weight", None)
    tensors = {}
    for file in weight_files(directory):
        with open_weights(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                if name in known:
                    tensors[known[name]] = weights.get_tensor(name).float()
    unknown = tensor_shapes(directory).keys() - known.keys() - {"lm_head.weight"}
    unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}
    if unknown:
        raise ModelError(f"{directory}: tensor {min(unknown)} is not part of a {values['model_type']} model")
    _check(config, tensors, directory)
    files = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}
    if "tokenizer.json" not in files:
        raise ModelError(f"{directory}: no tokenizer.json beside the weights")
    return DenseSource(config, tensors, files)


def dense_shapes(config: NSAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a dense model of this config has: an NSA model's less the gates."""
    from nsa_models.transformer import parameter_shapes

    return {name: shape for name, shape in parameter_shapes(config).items() if ".g_proj." not in name}


def _check(config: NSAConfig, tensors: dict[str, Tensor], where: Path) -> None:
    for name, shape in dense_shapes(config).items():
        if name not in tensors:
            raise ModelError(f"{where}: no tensor for {name}")
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"{where}: {name} has shape {list(tensors[name].shape)}, the config says {list(shape)}")


# GGUF

_GGUF_LAYER = {
    "attn_norm": "attn_norm",
    "ffn_norm": "mlp_norm",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TOP = {"token_embd": "model.embeddings", "output_norm": "model.norm", "output": "lm_head"}


def _read_gguf(path: Path) -> DenseSource:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of any kind: the reader does not check what it reads
        raise ModelError(f"{path}: not a GGUF file, or truncated ({error}); copy it again") from None
    names = {tensor.name for tensor in reader.tensors}
    try:
        config = _gguf_config(fields, names, path)
        files = _gguf_tokenizer(fields, path)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ModelError(f"{path}: the metadata cannot be used ({what})") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}" if str(error).startswith("config: ") else str(error)) from None
    tensors = {}
    for tensor in reader.tensors:
        name = _gguf_name(tensor.name, path)
        tensors[name] = _dequantize(tensor, path)
    _check(config, tensors, path)
    if fields["general.architecture"] == "llama":
        _unpermute(config, tensors)
    return DenseSource(config, tensors, files)


def _gguf_config(fields: dict, names: set[str], path: Path) -> NSAConfig:
    arch = fields.get("general.architecture")
    if arch not in FORMATS or not FORMATS[arch].dense:
        raise ModelError(f"{path}: unknown architecture {arch!r}; nsa convert reads llama and qwen2")

    def get(key: str, default=None):
        value = fields.get(f"{arch}.{key}", default)
        if value is None:
            raise ModelError(f"{path}: no {arch}.{key}")
        return value

    heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{path}: rotary dimensions differ from head_dim, which is not supported")
    if "rope_freqs.weight" in names or get("rope.scaling.type", "none") != "none":
        raise ModelError(f"{path}: scaled RoPE in a GGUF is not supported; convert the safetensors directory instead")
    eos = fields.get("tokenizer.ggml.eos_token_id")
    return NSAConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=get("embedding_length"),
        num_hidden_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=get("feed_forward_length"),
        max_position_embeddings=get("context_length"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),
        tie_word_embeddings="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=() if eos is None else (eos,),
    )


def _gguf_name(name: str, path: Path) -> str:
    """blk.3.attn_q.weight -> model.layers.3.attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _GGUF_LAYER:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    if parts[0] in _GGUF_TOP and len(parts) == 2:
        return f"{_GGUF_TOP[parts[0]]}.{parts[1]}"
    raise ModelError(f"{path}: tensor {name} is not part of a llama or qwen2 model")


def _dequantize(tensor, path: Path) -> Tensor:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{path}: tensor {tensor.name}: {error}") from None
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: unquantized data is a read-only view


def _unpermute(config: NSAConfig, tensors: dict[str, Tensor]) -> None:
    """Llama GGUFs hold q and k rows in the order of interleaved RoPE pairs; ours rotates (i, i + D/2)."""
    D = config.head_dim
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            rows = tensor.view(-1, D // 2, 2, *tensor.shape[1:])
            tensors[name] = rows.transpose(1, 2).reshape(tensor.shape).contiguous()


def _gguf_tokenizer(fields: dict, path: Path) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json from a GGUF's byte-level BPE vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: tokenizer {kind}/{pre} is not supported (known: gpt2 with {', '.join(_PRE_TOKENIZERS)}); "
            "convert the safetensors directory instead"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")  # Llama 3 takes whole words first
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: the tokenizer's merges do not fit its tokens ({error})") from None
    tokenizer = Tokenizer(model)
    _PRE_TOKENIZERS[pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(t, special=True, normalized=False) for t, n in zip(tokens, types, strict=True) if n == 3]
    defined = [AddedToken(t, special=False, normalized=False) for t, n in zip(tokens, types, strict=True) if n == 4]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(defined)

    def spelled(which: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{which}_token_id")
        return None if index is None else tokens[index]

    settings = {
        "bos_token": spelled("bos"),
        "eos_token": spelled("eos"),
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n",
    }


def _smollm(tokenizer) -> None:
    from tokenizers import pre_tokenizers as pre

    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])


def _regex(digits: str, nfc: bool) -> Callable:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def setup(tokenizer) -> None:
        from tokenizers import Regex, normalizers
        from tokenizers import pre_tokenizers as pre

        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        split = pre.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    return setup


_PRE_TOKENIZERS = {
    "smollm": _smollm,
    "qwen2": _regex(r"\p{N}", nfc=True),
    "llama-bpe": _regex(r"\p{N}{1,3}", nfc=False),
}
