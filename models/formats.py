"""The checkpoint formats that can be read: how each one's `config.json` and parameter names translate into ours.

Imports no torch: `nsa plan` reads configs and file headers only. A key in `config.json` is translated, known to be
harmless, fixed to the one value that this project computes, or an error: it may change the math.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_models.config import NSAConfig, RopeScaling
from nsa_models.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1  # of our own config.json, key "nsa_format"

HARMLESS = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "model_type", "tokenizer_class", "transformers_version"),
        *("dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),  # read by name, or of no consequence
        *("attention_dropout", "initializer_range", "pretraining_tp", "id2label", "label2id"),
        *("fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "use_l2warp"),
        *("layer_types", "max_window_layers", "sliding_window"),  # use_sliding_window decides, and is fixed
        *("_attn_implementation_autoset", "is_llama_config", "rope_interleaved", "transformers.js_config"),
    )
)


@dataclass(frozen=True)
class Format:
    """One family of checkpoints. `keys`: its name of a config key -> ours."""

    keys: Mapping[str, str]
    fixed: Mapping[str, tuple] = field(default_factory=dict)  # keys that must have one of these values, if present
    derive: Callable[[dict, Path], dict] = lambda values, directory: {}  # the rest of our config
    names: tuple[tuple[str, str], ...] = ()  # (ours, theirs): parts of parameter names
    reads: frozenset[str] = frozenset()  # keys that `derive` looks at
    dense: bool = False  # a source for `nsa convert`, not runnable

    def file_name(self, name: str) -> str:
        """The name under which a file of this format holds our parameter `name`."""
        for ours, theirs in self.names:
            name = name.replace(ours, theirs)
        return name


def read_config(directory: str | Path) -> NSAConfig:
    """The config of a checkpoint directory in any runnable format. Raises ModelError with one line on what is wrong."""
    directory = Path(directory)
    values = read_json(directory / "config.json")
    found = format_of(values, directory)
    if found.dense:
        raise ModelError(
            f"{directory}: a dense {values['model_type']} checkpoint, not an NSA one; convert it first: "
            f"nsa convert {directory} OUT"
        )
    return translate(found, values, directory)


def format_of(values: dict, directory: Path) -> Format:
    """Which format a config.json is in."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{directory / 'config.json'}: no model_type, so the architecture is unknown")
    if kind == "nsa" and "nsa_format" in values:
        if values["nsa_format"] != FORMAT_VERSION:
            raise ModelError(
                f"{directory}: nsa_format {values['nsa_format']!r} is not {FORMAT_VERSION}; a newer nsa may read it"
            )
        return OURS
    if kind not in FORMATS:
        raise ModelError(
            f"{directory / 'config.json'}: unknown architecture {kind!r}; known: nsa, llama-nsa, and llama, qwen2 for "
            "nsa convert"
        )
    return FORMATS[kind]


def translate(source: Format, values: dict, directory: Path) -> NSAConfig:
    """Our config from a foreign one's values."""
    try:
        return _translate(source, values, directory)
    except _Config as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from None
    except ModelError as error:
        prefix = f"{directory}: " if str(error).startswith("config: ") else ""
        raise ModelError(f"{prefix}{error}") from None


def _translate(source: Format, values: dict, directory: Path) -> NSAConfig:
    if source is OURS:
        return NSAConfig.from_dict({k: v for k, v in values.items() if k not in ("model_type", "nsa_format")})
    known = source.keys.keys() | source.fixed.keys() | source.reads | HARMLESS
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; it may change what the model computes"
            raise _Config(f"unknown key {key!r}{hint}")
        if key in source.fixed and value not in source.fixed[key]:
            raise _Config(f"{key} = {value!r} is not supported")
    ours = {source.keys[key]: value for key, value in values.items() if key in source.keys}
    ours |= {"bos_token_id": values.get("bos_token_id"), "eos_token_ids": _eos_ids(values, directory)}
    return NSAConfig.from_dict(ours | source.derive(values, directory))


def read_json(path: Path) -> dict:
    """A JSON object. Raises ModelError if the file is missing, unreadable or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values


class _Config(ModelError):
    """What is wrong with config.json; `translate` adds the path."""


def _number(values: dict, key: str, default: float | None = None, kind: type = int):
    """values[key] as an int or float of at least 0; `default` where it is missing or null. Raises _Config."""
    value = values.get(key)
    if value is None:
        if default is None:
            raise _Config(f"missing {key}")
        return default
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not 0 <= value < 1 << 62:
        raise _Config(f"{key} must be a number of at least 0, got {value!r}")
    return kind(value)


def _positive(values: dict, key: str, default: int | None = None) -> int:
    value = _number(values, key, default)
    if value == 0:
        raise _Config(f"{key} must be positive, got 0")
    return value


def _eos_ids(values: dict, directory: Path) -> tuple[int, ...]:
    """generation_config.json decides where there is one: chat models name their end-of-turn token only there."""
    generation = directory / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos = values.get("eos_token_id") if eos is None else eos
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


# Weight files


def weight_files(directory: Path) -> list[Path]:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise ModelError(f"{index}: no weight_map from tensors to files")
        files = [directory / name for name in sorted(set(shards.values()))]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: no such file; the checkpoint is incomplete")
    return files


def weights_bytes(directory: str | Path) -> int:
    """Bytes of all weight files."""
    return sum(file.stat().st_size for file in weight_files(Path(directory)))


@contextmanager
def open_weights(file: Path, framework: str = "numpy") -> Iterator:
    """A memory-mapped safetensors file. Raises ModelError if it is truncated or not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework=framework) as weights:
            yield weights
    except SafetensorError as error:
        raise ModelError(f"{file}: truncated or not safetensors ({error}); copy it again") from None
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror or error}") from None


def write_weights(file: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """A safetensors file, readable by whom any new file is: safetensors alone writes them for their owner. Raises
    OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from None
    file.chmod(mode)


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint's files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                shapes[name] = tuple(weights.get_slice(name).get_shape())
    return shapes


# What `derive` adds per format


def _fla(values: dict, directory: Path) -> dict:
    """flash-linear-attention's `nsa`. Its forced blocks became {first, previous, own} on 2025-08-14; before, only the
    own one. The config key fuse_linear_cross_entropy, new on 2025-08-07, tells the age; initial_blocks and local_blocks
    in config.json overrule it.
    """
    hidden, heads = _number(values, "hidden_size"), _positive(values, "num_heads")
    width = 256 * -(-int(hidden * _number(values, "hidden_ratio", 4, float) * 2 / 3) // 256)
    block = _number(values, "block_size", 64)
    recent = "fuse_linear_cross_entropy" in values
    return {
        "num_kv_heads": _number(values, "num_kv_heads", heads if "num_kv_heads" in values else None),
        "intermediate_size": _number(values, "intermediate_size", width),
        "head_dim": _head_dim(directory, "model.layers.0.attn.q_proj.weight", heads),
        "compress_block": block,
        "compress_stride": block,
        "select_block": block,
        "select_count": _power_of_two(_positive(values, "block_counts", 16)),
        "window": _window(values, 512),
        "initial_blocks": _number(values, "initial_blocks", 1 if recent else 0),
        "local_blocks": _number(values, "local_blocks", 2 if recent else 1),
    }


def _llama_nsa(values: dict, directory: Path) -> dict:
    """The NSA-1B family: only the own block is forced, and its top-k merges halves block by block (nsa 2.2)."""
    block, count = _number(values, "block_size", 16), _power_of_two(_positive(values, "block_counts", 16))
    heads = _positive(values, "num_attention_heads")
    return _llama(values, directory) | {
        "head_dim": _head_dim(directory, "model.layers.0.self_attn.q_proj.weight", heads),
        "compress_block": block,
        "compress_stride": block,
        "select_block": block,
        "select_count": count,
        "window": _window(values, 128),
        "initial_blocks": 0,
        "local_blocks": 1,
        "topk": "streamed",
        "topk_chunk": count,
    }


def _llama(values: dict, directory: Path) -> dict:
    """What dense llama and qwen2 configs share."""
    heads = _positive(values, "num_attention_heads")
    return {
        "head_dim": _number(values, "head_dim", _number(values, "hidden_size") // heads),
        "num_kv_heads": _number(values, "num_key_value_heads", heads),
        "qkv_bias": values.get("attention_bias", False),
        "rope_theta": _rope_theta(values),
        "rope_scaling": _rope_scaling(values),
    }


def _qwen2(values: dict, directory: Path) -> dict:
    return _llama(values, directory) | {"qkv_bias": True}


def _window(values: dict, default: int) -> int:
    """null or 0 turn the branch off, a missing key is the architecture's own default."""
    return _number(values, "window_size", 0) if "window_size" in values else default


def _rope_theta(values: dict) -> float:
    nested = _number(_object(values, "rope_parameters"), "rope_theta", 10000.0, float)
    return _number(values, "rope_theta", nested, float)


def _object(values: dict, key: str) -> dict:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise _Config(f"{key} must be an object, got {found!r}")
    return found


def _rope_scaling(values: dict) -> RopeScaling | None:
    """`rope_scaling`, or `rope_parameters` as newer libraries write it."""
    scaling = _object(values, "rope_scaling") or _object(values, "rope_parameters")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    known = {f: scaling[f] for f in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor") if f in scaling}
    extra = scaling.keys() - known.keys() - {"rope_type", "type", "factor", "original_max_position_embeddings"}
    extra -= {"rope_theta"}
    if kind not in ("yarn", "llama3", "linear") or extra:
        what = ", ".join(sorted(extra)) or kind
        raise _Config(f"rope_scaling {what!r} is not supported")
    trained = _number(scaling, "original_max_position_embeddings", values.get("max_position_embeddings"))
    return RopeScaling(_number(scaling, "factor", kind=float), trained, kind=kind, **known)


def _head_dim(directory: Path, name: str, heads: int) -> int:
    """From the query projection: fla ignored the config's head_dim until 2025-12-13 and saved it all the same."""
    shape = tensor_shapes(directory).get(name)
    if not shape:
        raise ModelError(f"{directory}: no tensor {name}")
    return shape[0] // heads


def _power_of_two(n: int) -> int:
    """fla rounds block_counts up."""
    return 1 << (n - 1).bit_length()


_SHARED = {
    key: key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rope_theta")
} | {"tie_word_embeddings": "tie_word_embeddings"}
_LLAMA_KEYS = _SHARED | {
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "norm_eps",
}
_LLAMA_FIXED = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
}
_LLAMA_READS = frozenset(("head_dim", "num_key_value_heads", "attention_bias", "rope_scaling", "rope_parameters"))
_LLAMA_NAMES = (
    ("model.embeddings.", "model.embed_tokens."),
    (".attn_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attn.", ".self_attn."),
)

OURS = Format(keys={})
FORMATS = {
    "nsa": Format(
        keys=_SHARED
        | {"num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "qkv_bias": "qkv_bias", "norm_eps": "norm_eps"},
        fixed={"hidden_act": ("swish", "silu"), "attnres_block_size": (None,), "elementwise_affine": (True,)},
        derive=_fla,
        reads=frozenset(
            ("block_size", "block_counts", "window_size", "initial_blocks", "local_blocks")
            + ("head_dim", "hidden_ratio", "intermediate_size")
        ),
    ),
    "llama-nsa": Format(
        keys=_LLAMA_KEYS,
        fixed=_LLAMA_FIXED | {"attention_bias": (False,)},
        derive=_llama_nsa,
        names=_LLAMA_NAMES,
        reads=_LLAMA_READS | {"block_size", "block_counts", "window_size"},
    ),
    "llama": Format(
        keys=_LLAMA_KEYS, fixed=_LLAMA_FIXED, derive=_llama, names=_LLAMA_NAMES, reads=_LLAMA_READS, dense=True
    ),
    "qwen2": Format(
        keys=_LLAMA_KEYS, fixed=_LLAMA_FIXED, derive=_qwen2, names=_LLAMA_NAMES, reads=_LLAMA_READS, dense=True
    ),
}
