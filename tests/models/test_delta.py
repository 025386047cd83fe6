"""What training changed, merged into its base, and every way in which it can fail to fit."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nsa_models.delta import merge_delta, save_delta
from nsa_models.errors import ModelError

BASE = {"a.weight": torch.arange(12.0).view(3, 4), "norm.weight": torch.ones(5)}


def delta(tmp_path: Path, tensors: dict[str, torch.Tensor], base: str | None = "f00d") -> Path:
    file = tmp_path / "delta.safetensors"
    save_file(tensors, file, None if base is None else {"base_sha256": base})
    return file


def test_replaced_added_to_and_untouched(tmp_path) -> None:
    up, down = torch.randn(3, 2), torch.randn(2, 4)
    file = delta(tmp_path, {"a.weight.lora_up": up, "a.weight.lora_down": down, "norm.weight": torch.full((5,), 2.0)})
    before = {name: tensor.clone() for name, tensor in BASE.items()}
    merged = merge_delta(BASE, file, "f00d")
    torch.testing.assert_close(merged["a.weight"], BASE["a.weight"] + up @ down)
    assert torch.equal(merged["norm.weight"], torch.full((5,), 2.0))
    assert all(torch.equal(BASE[name], before[name]) for name in BASE), "the base itself is not changed"


def test_narrow_types_are_widened(tmp_path) -> None:
    up, down = torch.randn(3, 2).bfloat16(), torch.randn(2, 4).bfloat16()
    file = delta(tmp_path, {"a.weight.lora_up": up, "a.weight.lora_down": down})
    merged = merge_delta(BASE, file, "f00d")
    assert merged["a.weight"].dtype == torch.float32
    torch.testing.assert_close(merged["a.weight"], BASE["a.weight"] + up.float() @ down.float())


@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 5), scale=st.floats(1e-6, 1e3))
def test_what_is_written_is_merged_within_two_hundredths(seed: int, rank: int, scale: float) -> None:
    """An int8 factor is off by 0.9 % or less of its own root mean square where its largest is 4 times that."""
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(96, rank, generator=g) * scale, torch.randn(rank, 64, generator=g)
    base = {"a.weight": torch.zeros(96, 64), "norm.weight": torch.ones(5)}
    norm = torch.rand(5, generator=g)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "delta.safetensors"
        save_delta(file, {"a.weight.lora_up": up, "a.weight.lora_down": down, "norm.weight": norm}, "f00d")
        merged = merge_delta(base, file, "f00d")
        assert file.stat().st_size < 1000 + 160 * rank, "a byte each"
    error = (merged["a.weight"] - up @ down).norm() / (up @ down).norm()
    assert error < 0.02
    assert torch.equal(merged["norm.weight"], norm.bfloat16().float())


def test_a_delta_is_readable_by_whom_any_file_is(tmp_path) -> None:
    save_delta(tmp_path / "d", {"norm.weight": torch.ones(5)}, "f00d")
    (tmp_path / "any").touch()
    assert (tmp_path / "d").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["any", "d"]


def test_updates_of_zero_stay_zero(tmp_path) -> None:
    save_delta(tmp_path / "d", {"a.weight.lora_up": torch.zeros(3, 2), "a.weight.lora_down": torch.ones(2, 4)}, "f00d")
    assert torch.equal(merge_delta(BASE, tmp_path / "d", "f00d")["a.weight"], BASE["a.weight"])


def test_an_empty_delta_changes_nothing(tmp_path) -> None:
    merged = merge_delta(BASE, delta(tmp_path, {}), "f00d")
    assert merged.keys() == BASE.keys() and all(torch.equal(merged[n], BASE[n]) for n in BASE)


UP, DOWN = torch.ones(3, 2), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"b.weight": torch.ones(1)}, "b.weight changes no parameter of the base"),
        ({"b.weight.lora_up": UP, "b.weight.lora_down": DOWN}, "changes no parameter of the base"),
        ({"norm.weight": torch.ones(6)}, "norm.weight has shape [6], not [5]"),
        ({"a.weight": torch.ones(4, 3)}, "a.weight has shape [4, 3], not [3, 4]"),
        ({"a.weight.lora_up": UP}, "a.weight.lora_up has no .lora_down beside it"),
        ({"a.weight.lora_down": DOWN}, "a.weight.lora_down has no .lora_up beside it"),
        ({"a.weight.lora_up": UP, "a.weight.lora_down": torch.ones(3, 4)}, "ranks differ: [3, 2] times [3, 4]"),
        ({"a.weight.lora_up": torch.ones(3), "a.weight.lora_down": DOWN}, "ranks differ: [3] times [2, 4]"),
        ({"a.weight.lora_up": UP, "a.weight.lora_down": torch.ones(2, 5)}, "has shape [3, 5], not [3, 4]"),
        # would broadcast: one row of up times down onto three
        ({"a.weight.lora_up": torch.ones(1, 2), "a.weight.lora_down": DOWN}, "has shape [1, 4], not [3, 4]"),
        (
            {"a.weight.lora_up": UP, "a.weight.lora_down": DOWN, "a.weight.lora_scale": torch.ones(1)},
            "has shape [1], not",
        ),
        ({"a.weight.lora_scale": torch.ones(2)}, "a.weight.lora_scale has no .lora_up beside it"),
        ({"b.weight.lora_scale": torch.ones(2)}, "changes no parameter of the base"),
        ({"a.weight": torch.ones(3, 4), "a.weight.lora_up": UP, "a.weight.lora_down": DOWN}, "replaced and added to"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, tensors: dict, words: str) -> None:
    file = delta(tmp_path, tensors)
    with pytest.raises(ModelError) as error:
        merge_delta(BASE, file, "f00d")
    assert words in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("made_for", ["beef", None])
def test_another_base(tmp_path, made_for) -> None:
    with pytest.raises(ModelError, match=f"made for the base {made_for}, not for f00d"):
        merge_delta(BASE, delta(tmp_path, {}, made_for), "f00d")


def test_a_file_that_is_no_delta(tmp_path) -> None:
    (tmp_path / "delta.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="truncated or not safetensors"):
        merge_delta(BASE, tmp_path / "delta.safetensors", "f00d")
    with pytest.raises(ModelError, match="No such file"):
        merge_delta(BASE, tmp_path / "nowhere.safetensors", "f00d")
