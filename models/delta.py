"""What training changed, kept apart from its base: a small safetensors file that is merged at install.

A tensor named like a parameter replaces it (gates, compression, norms). `X.lora_up` (out, r) and `X.lora_down` (r, in)
add up @ down to X (arXiv 2106.09685; scaling already multiplied in), (up * scale) @ down with an `X.lora_scale` (r,)
beside them. Metadata `base_sha256` names the base file.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nsa_models.errors import ModelError, NSAError
from nsa_models.formats import open_weights, write_weights
from nsa_models.quantize import quantize_int8

UP, DOWN, SCALE = ".lora_up", ".lora_down", ".lora_scale"


def merge_delta(tensors: Mapping[str, Tensor], file: Path, base_sha256: str) -> dict[str, Tensor]:
    """`tensors` (float32) with the delta applied. Raises ModelError if it belongs to another base or does not fit."""
    with open_weights(file, "pt") as delta:
        made_for = (delta.metadata() or {}).get("base_sha256")
        if made_for != base_sha256:
            raise ModelError(f"{file}: made for the base {made_for}, not for {base_sha256}")
        changes = {name: delta.get_tensor(name).float() for name in delta.keys()}  # noqa: SIM118 (not a dict)
    merged = dict(tensors)
    for name, change in changes.items():
        target = name.removesuffix(UP).removesuffix(DOWN).removesuffix(SCALE)
        if target not in merged:
            raise ModelError(f"{file}: {name} changes no parameter of the base")
        if name.endswith((DOWN, SCALE)):
            if target + UP not in changes:
                raise ModelError(f"{file}: {name} has no {UP} beside it")
            continue
        low_rank = name.endswith(UP)
        if low_rank:
            change = _product(changes, target, file)
        if change.shape != tensors[target].shape:
            raise ModelError(f"{file}: {name} has shape {list(change.shape)}, not {list(tensors[target].shape)}")
        merged[target] = tensors[target] + change if low_rank else change
    return merged


def _product(changes: Mapping[str, Tensor], target: str, file: Path) -> Tensor:
    """up @ down of one parameter, each of the r parts times its scale."""
    if target in changes:
        raise ModelError(f"{file}: {target} is both replaced and added to")
    if target + DOWN not in changes:
        raise ModelError(f"{file}: {target}{UP} has no {DOWN} beside it")
    up, down = changes[target + UP], changes[target + DOWN]
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ModelError(f"{file}: {target}: ranks differ: {list(up.shape)} times {list(down.shape)}")
    scale = changes.get(target + SCALE, torch.ones(up.shape[1]))
    if scale.shape != up.shape[1:]:
        raise ModelError(f"{file}: {target}{SCALE} has shape {list(scale.shape)}, not {list(up.shape[1:])}")
    return (up * scale) @ down


def quantize_updates(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`changes` with low-rank updates as int8 and one scale for each of their r parts, the rest in bfloat16.

    Half of bfloat16's bytes, and updates 1 % off: of the built-in model's, 1e-5 in the mean, where its int8 maps are
    rounded by 1.6e-3.
    """
    stored = {}
    for name, tensor in changes.items():
        if name.endswith(UP):
            target = name.removesuffix(UP)
            up, up_scale = quantize_int8(tensor.T)
            stored[target + DOWN], down_scale = quantize_int8(changes[target + DOWN])
            stored[name], stored[target + SCALE] = up.T, up_scale * down_scale
        elif not name.endswith(DOWN):
            stored[name] = tensor.bfloat16()
    return stored


def save_delta(file: Path, changes: Mapping[str, Tensor], base_sha256: str) -> None:
    """Write `changes`, quantized, all or nothing. Raises NSAError if the disk is full or not writable."""
    staging = file.with_name(file.name + ".new")
    try:
        write_weights(staging, quantize_updates(changes), {"base_sha256": base_sha256})
        staging.replace(file)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise NSAError(f"{file}: cannot write the delta ({error.strerror or error})") from None
