"""Benchmarks on a tiny random model: the numbers are consistent with each other, whatever the machine."""

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nsa_cli import bench
from nsa_cli.commands.bench import command
from nsa_kernels import native
from nsa_models import NSAConfig, save_model
from nsa_models.cost import BRANCHES, cache_bytes
from nsa_models.errors import BudgetError, InputError
from nsa_models.transformer import NSAModel

HELP = {"help_option_names": ["-h", "--help"]}  # as the group gives them: a command keeps the first it is asked for
CONFIG = NSAConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_position_embeddings=4096,
    window=64,
    select_count=4,
)


def random_model() -> NSAModel:
    model = NSAModel(CONFIG)
    for p in model.parameters():
        p.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(), path, {"tokenizer.json": byte_tokenizer().to_str().encode()})
    return path


def run(checkpoint: Path, *args: str):
    # One repeat and few tokens: what is tested is what is reported, not how steady it is.
    settings = ["--model", str(checkpoint), "--lengths", "700,300", "--decode", "5", "--repeat", "2"]
    return CliRunner().invoke(command, [*settings, *args], catch_exceptions=False, **HELP)


def test_json_has_one_object_per_length(checkpoint: Path) -> None:
    records = [json.loads(line) for line in run(checkpoint, "--json", "--dense-max", "300").stdout.splitlines()]
    assert [r["tokens"] for r in records] == [300, 700]
    assert records[0]["dense"] is not None and records[1]["dense"] is None
    for r in records:
        assert r["model"] == "tiny" and r["machine"]["dtype"] in ("float32", "bfloat16")
        assert r["machine"]["threads"] == torch.get_num_threads()
        assert r["load_s"] > 0 and r["first_chunk_s"] > 0
        for speed in filter(None, (r["nsa"], r["dense"])):
            for rate in (speed["prefill"], speed["decode"]):
                assert 0 < rate["low"] <= rate["median"] <= rate["high"]
            assert 0 < speed["share"] < 1.2
            reached = speed["operations"] * speed["prefill"]["median"] / r["tokens"]
            assert speed["share"] == pytest.approx(reached / r["matrix_rate"])
            assert speed["peak_bytes"] > cache_bytes(CONFIG, r["tokens"])


def test_table_has_a_row_per_attention(checkpoint: Path) -> None:
    lines = run(checkpoint).stdout.splitlines()
    assert lines[0].startswith("tiny on ") and "GFLOP/s" in lines[1] and "selected" in lines[2]
    assert [line.split()[:2] for line in lines[4:]] == [
        ["tokens", "attention"],
        ["300", "nsa"],
        ["300", "dense"],
        ["700", "nsa"],
        ["700", "dense"],
    ]
    assert len({len(line) for line in lines[4:]}) == 1
    assert all("dense" not in line for line in run(checkpoint, "--no-dense").stdout.splitlines())


def test_the_text_option_is_what_is_read(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(bench, "first_chunk", lambda model, ids: seen.append(ids) or 1.0)
    (tmp_path / "text").write_text("abc")
    run(checkpoint, "--no-dense", "--text", str(tmp_path / "text"))
    assert len(seen[0]) == 700 and seen[0][:3] == seen[0][3:6] and len(set(seen[0])) == 3
    (tmp_path / "text").write_text("")
    with pytest.raises(InputError, match="empty"):
        raise run_error(checkpoint, "--text", str(tmp_path / "text"))


def run_error(checkpoint: Path, *args: str) -> BaseException:
    settings = ["--model", str(checkpoint), "--lengths", "300", *args]
    return CliRunner().invoke(command, settings, **HELP).exception


def test_lengths_that_do_not_fit_are_refused_before_loading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_cli.checkpoint.Checkpoint.model", None)
    with pytest.raises(BudgetError, match=r"4,090: with 32 tokens to generate 4,122, the model's contexts hold 4,096"):
        raise run_error(checkpoint, "--lengths", "300,4090")
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(500_000_000))
    with pytest.raises(BudgetError, match=r"300: 60\d MB of memory needed, 500 MB are free"):
        raise run_error(checkpoint)


def test_standard_library_text_is_the_same_every_time() -> None:
    first, again = (next(bench.library_sources()) for _ in range(2))
    assert first == again and "def " in first


def test_operations_of_dense_grow_with_the_square() -> None:
    def attention(tokens: int, dense: bool) -> int:
        return bench.operations(CONFIG, tokens, dense) - 2 * bench.linear_parameters(CONFIG) * tokens

    per_key = CONFIG.num_hidden_layers * CONFIG.num_heads * 2 * 2 * CONFIG.head_dim
    assert attention(4000, dense=True) == per_key * 4000 * 4001 // 2
    assert attention(40_000, dense=False) < attention(40_000, dense=True) / 5


def test_operations_leave_out_what_no_gate_lets_through() -> None:
    model = random_model().bfloat16()
    assert bench.computed_branches(model) == list(BRANCHES)  # no bias: gates are what the tokens make them
    gated = NSAModel(replace(CONFIG, gate_bias=True), dtype=torch.bfloat16)
    for layer in gated.model.layers:
        layer.attn.g_proj.weight.zero_()
        layer.attn.g_proj.bias.view(-1, 3).copy_(torch.tensor([-14.0, 14.0, 0.0]))
    fast = native.supports(torch.empty(1, 1, 16, dtype=torch.bfloat16))
    assert bench.computed_branches(gated) == (["selected", "window"] if fast else list(BRANCHES))
    assert bench.computed_branches(gated.float()) == list(BRANCHES)
    per_key = CONFIG.num_hidden_layers * CONFIG.num_heads * 2 * 2 * CONFIG.head_dim
    every, some = (bench.operations(CONFIG, 6400, False, names) for names in (BRANCHES, ["selected"]))
    window = per_key * (64 * (6400 - 64) + 64)  # whole from the second block of queries on, as counted
    compressed = per_key // 2 * 64 * sum(CONFIG.variant.compressed_count(n) for n in range(1, 6401, 64))
    assert every - some == window + compressed


def test_rate_is_a_median_with_its_spread() -> None:
    rate = bench.Rate.of(10, [1.0, 2.0, 5.0])
    assert (rate.median, rate.low, rate.high) == pytest.approx((5, 2.6, 9))
    assert bench.Rate.of(10, [4.0]) == bench.Rate(2.5, 2.5, 2.5)


def test_decode_steps_are_timed_without_the_first_choice() -> None:
    from nsa_models import Cache, prefill

    model = random_model()
    cache = Cache.for_model(model, 120)
    logits = prefill(model, list(range(100)), cache)
    steps = list(bench.decode_seconds(model, cache, logits, 7, dense=False))
    assert len(steps) == 7 and min(steps) > 0 and cache.length == 107


def test_matrix_rate_is_that_of_the_dtype() -> None:
    assert bench.matrix_rate(random_model(), repeat=2) > 1e9


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no way to reset the peak")
def test_peak_memory_is_of_what_ran_since_the_reset() -> None:
    cpu = torch.device("cpu")
    bench.reset_peak(cpu)
    before = bench.peak_bytes(cpu)
    torch.ones(30_000_000)
    assert bench.peak_bytes(cpu) - before > 90_000_000
