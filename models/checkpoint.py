"""A checkpoint directory in, a model out, and back. Every parameter is checked by name and shape before use."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nsa_models.config import NSAConfig
from nsa_models.errors import ModelError, NSAError
from nsa_models.formats import (
    FORMAT_VERSION,
    Format,
    format_of,
    open_weights,
    read_config,
    read_json,
    tensor_shapes,
    weight_files,
    write_weights,
)
from nsa_models.linear import Linear
from nsa_models.transformer import Embedding, NSAModel, parameter_shapes

INT8_SCALE = "_scale"  # an int8 weight X has its float scales, one per output channel, in X_scale


def load_model(
    path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> NSAModel:
    """The model of a checkpoint directory of any runnable format (design: `formats.py`).

    device: None = a GPU if there is one, else the CPU. dtype of activations: None = bfloat16 where the device
    multiplies it fast, else float32. Weights stay mapped from the file where dtype and device allow; int8 ones are
    expanded on a GPU, which has no product with them.
    Raises ModelError in one line if files are missing or truncated, or names or shapes do not match the config.
    """
    directory = Path(path)
    config = read_config(directory)
    source = format_of(read_json(directory / "config.json"), directory)
    names = {source.file_name(name): name for name in parameter_shapes(config)}
    check_shapes(config, tensor_shapes(directory), source, directory)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or default_dtype(device)
    model = NSAModel(config, device="meta", dtype=dtype)
    for file in weight_files(directory):
        with open_weights(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                if name in names:
                    _assign(model, names[name], weights.get_tensor(name), device, dtype)
                elif name.endswith(INT8_SCALE):
                    _set_scale(model, names[name.removesuffix(INT8_SCALE)], weights.get_tensor(name), device)
    _check_storage(model, source, directory)
    if device.type != "cpu":
        _expand(model, dtype)
    model.fingerprint = fingerprint(directory)
    return model


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 but on CPUs without its instructions, where it is emulated some 300 times slower than float32."""
    if device.type == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32
    return torch.bfloat16


def check_shapes(config: NSAConfig, found: Mapping[str, tuple[int, ...]], source: Format, where: Path | str) -> None:
    """Raise ModelError unless `found` holds exactly this config's parameters (and scales of int8 ones)."""
    expected = {source.file_name(name): shape for name, shape in parameter_shapes(config).items()}
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(f"{where}: tensor {name} is missing ({_count(expected, found)})")
        if found[name] != shape:
            raise ModelError(f"{where}: tensor {name} has shape {list(found[name])}, the config says {list(shape)}")
    tied = "lm_head.weight" if config.tie_word_embeddings else None  # some writers store the tied table twice
    for name, shape in found.items():
        weight = name.removesuffix(INT8_SCALE)
        is_scale = name.endswith(INT8_SCALE) and weight in expected and shape == expected[weight][:1]
        if name not in expected and name != tied and not is_scale:
            raise ModelError(f"{where}: tensor {name} is not part of this architecture")


def _check_storage(model: NSAModel, source: Format, where: Path) -> None:
    """int8 and scales come together, and only in linear maps and embeddings; everything else is floating point."""
    for name, tensor in model.named_parameters():
        module, leaf = _owner(model, name)
        scaled = leaf == "weight" and getattr(module, "weight_scale", None) is not None
        what = None
        if tensor.dtype == torch.int8 and not scaled:
            what = f"is int8 without its {leaf}{INT8_SCALE}"
        elif tensor.dtype == torch.int8 and not isinstance(module, Linear | Embedding):
            what = "may not be int8"
        elif tensor.dtype != torch.int8 and scaled:
            what = "has scales, but is not int8"
        if what:
            raise ModelError(f"{where}: tensor {source.file_name(name)} {what}")


def _count(expected: Mapping, found: Mapping) -> str:
    missing = len(expected.keys() - found.keys())
    return f"{missing} of {len(expected)} are"


def _owner(model: NSAModel, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _assign(model: NSAModel, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    module, leaf = _owner(model, name)
    if tensor.dtype != torch.int8 and not tensor.is_floating_point():
        raise ModelError(
            f"tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is not a weight"
        )
    tensor = tensor.to(device, tensor.dtype if tensor.dtype == torch.int8 else dtype)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def _set_scale(model: NSAModel, name: str, scale: Tensor, device: torch.device) -> None:
    module, _ = _owner(model, name)
    module.weight_scale = scale.to(device, torch.float32)


def _expand(model: NSAModel, dtype: torch.dtype) -> None:
    """Replace int8 weights by the float ones that they stand for."""
    for module in model.modules():
        if isinstance(module, Linear | Embedding) and module.weight_scale is not None:
            weight = (module.weight.float() * module.weight_scale[:, None]).to(dtype)
            module.weight, module.weight_scale = nn.Parameter(weight, requires_grad=False), None


def fingerprint(directory: Path) -> str:
    """sha256 over config.json and every weight file: the identity of what the model computes."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in weight_files(directory):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def save_model(model: NSAModel, path: str | Path, files: Mapping[str, bytes] | None = None) -> None:
    """Write a checkpoint directory in our own format; see `save_checkpoint`."""
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if getattr(module, "weight_scale", None) is not None:
            tensors[f"{name}.weight{INT8_SCALE}"] = module.weight_scale
    save_checkpoint(path, model.config, tensors, files)


def save_checkpoint(
    path: str | Path,
    config: NSAConfig,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> None:
    """Write `tensors` under our names with their config and, from `files`, tokenizer and model card.

    All or nothing: written beside `path` and renamed. Raises ModelError if `path` exists and not `replace`, NSAError
    if the disk is full or not writable.
    """
    target = Path(path)
    if target.exists() and not replace:
        raise ModelError(f"{target} exists; remove it or name another place")
    check_shapes(config, {name: tuple(t.shape) for name, t in tensors.items()}, Format(keys={}), target)
    values = {"model_type": "nsa", "nsa_format": FORMAT_VERSION} | config.to_dict()
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o755)
        (staging / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            (staging / name).write_bytes(content)
        write_weights(staging / "model.safetensors", tensors, {"format": "pt"})
        _replace(staging, target)
    except OSError as error:
        what = error.strerror or error
        raise NSAError(f"{target}: cannot write the checkpoint ({what}); nothing was kept") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, target: Path) -> None:
    """Put `staging` in `target`'s place; an older directory goes only once the new one stands beside it whole."""
    if target.exists():
        old = staging.with_name(staging.name + ".old")
        os.rename(target, old)
        os.rename(staging, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(staging, target)
