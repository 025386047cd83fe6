"""What training changed, kept apart from its base: a small safetensors file that is merged at install.

A tensor named like a parameter replaces it (gates, compression, norms). `X.lora_up` (out, r) and `X.lora_down` (r, in)
add up @ down to X (arXiv 2106.09685; scaling already multiplied in). Metadata `base_sha256` names the base file.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nsa_models.errors import ModelError, NSAError
from nsa_models.formats import open_weights

UP, DOWN = ".lora_up", ".lora_down"


def merge_delta(tensors: Mapping[str, Tensor], file: Path, base_sha256: str) -> dict[str, Tensor]:
    """`tensors` (float32) with the delta applied. Raises ModelError if it belongs to another base or does not fit."""
    with open_weights(file, "pt") as delta:
        made_for = (delta.metadata() or {}).get("base_sha256")
        if made_for != base_sha256:
            raise ModelError(f"{file}: made for the base {made_for}, not for {base_sha256}")
        changes = {name: delta.get_tensor(name).float() for name in delta.keys()}  # noqa: SIM118 (not a dict)
    merged = dict(tensors)
    for name, change in changes.items():
        target = name.removesuffix(UP).removesuffix(DOWN)
        if target not in merged:
            raise ModelError(f"{file}: {name} changes no parameter of the base")
        if name.endswith(DOWN):
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
    """up @ down of one parameter."""
    if target in changes:
        raise ModelError(f"{file}: {target} is both replaced and added to")
    if target + DOWN not in changes:
        raise ModelError(f"{file}: {target}{UP} has no {DOWN} beside it")
    up, down = changes[target + UP], changes[target + DOWN]
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ModelError(f"{file}: {target}: ranks differ: {list(up.shape)} times {list(down.shape)}")
    return up @ down


def save_delta(file: Path, changes: Mapping[str, Tensor], base_sha256: str) -> None:
    """Write `changes` in bfloat16, all or nothing. Raises NSAError if the disk is full or not writable."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    staging = file.with_name(file.name + ".new")
    try:
        save_file({k: t.bfloat16().contiguous() for k, t in changes.items()}, staging, {"base_sha256": base_sha256})
        staging.replace(file)
    except (OSError, SafetensorError) as error:
        staging.unlink(missing_ok=True)
        raise NSAError(f"{file}: cannot write the delta ({getattr(error, 'strerror', None) or error})") from None
