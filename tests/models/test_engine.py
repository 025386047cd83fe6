"""The transformer, its cache and the engine on tiny random models of every variant."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsa_models import Cache, NSAConfig, Sampling, decode, prefill
from nsa_models.config import RopeScaling
from nsa_models.cost import cache_bytes
from nsa_models.errors import BudgetError, ModelError
from nsa_models.linear import Linear, int8_linear
from nsa_models.quantize import quantize
from nsa_models.step import Step
from nsa_models.transformer import NSAModel, parameter_shapes
from tests.models.tiny import CONFIG, random_model

pytestmark = pytest.mark.usefixtures("one_thread")

SCALING = {"factor": 8.0, "original_max_position_embeddings": 64}
DUAL = {**SCALING, "kind": "dual_chunk", "chunk": 32}
CHUNKS = RopeScaling(**DUAL)
CONFIGS = {
    "mean": CONFIG,
    "tied-biased": replace(CONFIG, tie_word_embeddings=True, qkv_bias=True, gate_bias=False),
    "linear-roped-after": replace(CONFIG, compress_kind="linear", compress_positions=True, compress_rope="after"),
    "softmax": replace(CONFIG, compress_kind="softmax", compress_positions=True),
    "mlp-unroped": replace(CONFIG, compress_kind="mlp", compress_positions=True, compress_rope="none"),
    "paper": replace(CONFIG, branch_kv=True, compress_kind="mlp", compress_positions=True, compress_rope="after"),
    "fla": replace(CONFIG, compress_block=16, compress_stride=16, initial_blocks=0, local_blocks=1),
    "wide-v": replace(CONFIG, v_head_dim=12),
    "yarn": replace(CONFIG, rope_scaling=RopeScaling(8.0, 64)),
    "dual-chunk": replace(CONFIG, rope_scaling=CHUNKS),
    "dual-chunk-after": replace(CONFIG, rope_scaling=CHUNKS, compress_rope="after", compress_kind="linear"),
    "dual-chunk-paper": replace(CONFIG, rope_scaling=CHUNKS, branch_kv=True, compress_rope="none"),
}


def random_ids(n: int) -> torch.Tensor:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request) -> NSAModel:
    return random_model(request.param)


def exact_cache(model: NSAModel, capacity: int) -> Cache:
    return Cache(model.config, capacity, dtype=model.dtype)


def test_prefill_in_any_chunks_equals_one_pass(model: NSAModel) -> None:
    ids = random_ids(203)
    whole = model(ids)[-1]
    for chunk in (1000, 64, 37):
        torch.testing.assert_close(
            prefill(model, ids, exact_cache(model, 203), chunk=chunk), whole, atol=2e-5, rtol=1e-4
        )


def test_decode_step_equals_prefill_of_one_token(model: NSAModel) -> None:
    ids = random_ids(171)
    expected = model(ids)
    cache = exact_cache(model, 171)
    prefill(model, ids[:150], cache)
    for t in range(150, 171):
        hidden = model.advance(ids[t : t + 1], cache)
        torch.testing.assert_close(model.logits(hidden)[0], expected[t], atol=2e-5, rtol=1e-4)


def test_later_tokens_change_nothing_earlier(model: NSAModel) -> None:
    ids = random_ids(203)
    if model.config.rope_factor(203) > 1:
        pytest.skip("a longer context is scaled differently by design; see test_scaling_follows_the_capacity")
    torch.testing.assert_close(model(ids)[:101], model(ids[:101]), atol=2e-5, rtol=1e-4)


def test_float32_equals_float64(model: NSAModel) -> None:
    ids = random_ids(150)
    truth = random_model(model.config, torch.float64)
    truth.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).double(), truth(ids), atol=1e-4, rtol=1e-4)


def test_truncate_then_prefill_equals_fresh(model: NSAModel) -> None:
    ids = random_ids(180)
    cache = exact_cache(model, 200)
    prefill(model, ids, cache)
    for cut in (163, 1):
        cache.truncate(cut)
        again = prefill(model, ids[cut:], cache, chunk=50)
        torch.testing.assert_close(again, model_logits(model, ids, 200), atol=2e-5, rtol=1e-4)


def model_logits(model: NSAModel, ids: torch.Tensor, capacity: int) -> torch.Tensor:
    return prefill(model, ids, exact_cache(model, capacity))


def test_tensors_rebuild_a_cache(model: NSAModel) -> None:
    ids = random_ids(90)
    cache = exact_cache(model, 120)
    prefill(model, ids[:80], cache)
    other = exact_cache(model, 120)
    for name, tensor in cache.tensors().items():
        other.buffers[name][:, : tensor.shape[1]] = tensor
    other.restore(80, cache.chunk)
    assert torch.equal(prefill(model, ids[80:], other), prefill(model, ids[80:], cache))


def test_dense_equals_nsa_while_every_block_is_selected() -> None:
    """Gates that let the selected branch alone answer: n * l' = 64 tokens are dense attention."""
    model = random_model(CONFIG)
    for layer in model.model.layers:
        layer.attn.g_proj.weight.zero_()
        layer.attn.g_proj.bias.copy_(torch.tensor([-30.0, 30.0, -30.0]).repeat(6))
    ids = random_ids(100)
    sparse = model(ids)
    dense = model.logits(model.advance(ids, exact_cache(model, 100), dense=True))
    torch.testing.assert_close(sparse[:64], dense[:64], atol=2e-5, rtol=1e-4)
    assert (sparse[70:] - dense[70:]).abs().max() > 1e-3


def test_scaling_follows_the_capacity() -> None:
    config = CONFIGS["yarn"]
    assert [config.rope_factor(n) for n in (1, 64, 65, 128, 129, 512, 513, 9999)] == [1, 1, 2, 2, 4, 8, 8, 8]
    model = random_model(config)
    short = model(random_ids(60))
    torch.testing.assert_close(short, random_model(replace(config, rope_scaling=None))(random_ids(60)))
    assert exact_cache(model, 65).rope_factor == 2


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones() -> None:
    from nsa_models.rope import Rope

    config = replace(CONFIG, head_dim=64, rope_theta=1e5, rope_scaling=RopeScaling(16.0, 8192))
    plain, scaled = Rope(config), Rope(config, 16.0)
    ratio = plain.frequency / scaled.frequency
    assert ratio[0] == 1 and torch.isclose(ratio[-1], torch.tensor(16.0, dtype=torch.float64))
    assert (ratio.diff() >= 0).all()
    assert scaled.magnitude == pytest.approx(0.1 * torch.tensor(16.0).log().item() + 1)


def test_two_threads_compute_the_same() -> None:
    model, ids = random_model(CONFIG), random_ids(600)
    one = model(ids)
    torch.set_num_threads(2)
    torch.testing.assert_close(model(ids), one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bfloat16_cache_stays_near(config: NSAConfig) -> None:
    """With every block selected, rounding cannot choose other ones: what is left is the rounding of keys and values
    to 9 bits, once per layer.
    """
    model, ids = random_model(replace(config, select_count=10)), random_ids(150)
    exact = model(ids)[-1]
    near = prefill(model, ids, Cache.for_model(model, 150))
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < 0.02


def test_greedy_decode_is_argmax_and_reproducible() -> None:
    model = random_model(CONFIG)
    ids = random_ids(70)
    runs = []
    for _ in range(2):
        cache = exact_cache(model, 100)
        logits = prefill(model, ids, cache)
        runs.append(list(decode(model, cache, logits, Sampling(max_tokens=8))))
    assert runs[0] == runs[1] and len(runs[0]) == 8
    told = torch.cat([ids, torch.tensor(runs[0])])
    assert model(told)[69:-1].argmax(-1).tolist() == runs[0]


def test_decode_stops_at_eos_at_max_tokens_and_at_capacity() -> None:
    model = random_model(CONFIG)
    cache = exact_cache(model, 80)
    logits = prefill(model, random_ids(70), cache)
    first = list(decode(model, cache, logits, Sampling(max_tokens=3)))
    assert len(first) == 3
    cache.truncate(70)
    assert list(decode(model, cache, logits, Sampling(max_tokens=3), eos_ids=[first[0]])) == []
    cache.truncate(70)
    assert len(list(decode(model, cache, logits, Sampling(max_tokens=100)))) == 11  # 10 free places and one more


def test_too_long_a_context_is_refused_with_numbers() -> None:
    model = random_model(replace(CONFIG, max_position_embeddings=100))
    with pytest.raises(BudgetError, match=r"130 tokens do not fit: the context holds 100; leave out 30"):
        prefill(model, random_ids(130), exact_cache(model, 200))


def test_interrupted_prefill_leaves_whole_chunks() -> None:
    model = random_model(CONFIG)
    cache = exact_cache(model, 200)

    def interrupt(done: int, total: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prefill(model, random_ids(180), cache, chunk=32, progress=interrupt)
    assert cache.length == 64
    rest = prefill(model, random_ids(180)[64:], cache)
    torch.testing.assert_close(rest, model_logits(model, random_ids(180), 200), atol=2e-5, rtol=1e-4)


def test_cache_bytes_are_what_is_allocated(model: NSAModel) -> None:
    cache = Cache.for_model(model, 203)
    allocated = sum(b.numel() * b.element_size() for b in cache.buffers.values())
    assert cache_bytes(model.config, 203) == allocated


def test_int8_linear_few_rows_and_many_rows_agree() -> None:
    layer = Linear(64, 48, True)
    layer.bias.data.normal_()
    layer.weight = torch.nn.Parameter(torch.randint(-127, 128, (48, 64), dtype=torch.int8), requires_grad=False)
    layer.weight_scale = (torch.rand(48) / 100).bfloat16().float()
    x = torch.randn(20, 64).bfloat16().float()
    expected = x @ (layer.weight.float() * layer.weight_scale[:, None]).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:2]), expected[:2], atol=0.02, rtol=0.01)  # bfloat16 result


@pytest.mark.parametrize("outputs", [1, 3, 4, 317])
@pytest.mark.parametrize("offset", [0, 4, 8])
def test_int8_weights_may_lie_anywhere_in_a_file(outputs: int, offset: int) -> None:
    """torch's kernel ended the process on 317 outputs at an address that is no multiple of 16."""
    weight = torch.randint(-127, 128, (outputs * 64 + offset,), dtype=torch.int8)[offset:].view(outputs, 64)
    scale, x = (torch.rand(outputs) / 100).bfloat16().float(), torch.randn(2, 64).bfloat16().float()
    expected = x @ (weight.float() * scale[:, None]).T
    torch.testing.assert_close(int8_linear(x, weight, scale), expected, atol=0.05, rtol=0.01)


def test_parameter_names_are_a_superset_of_flas() -> None:
    names = parameter_shapes(replace(CONFIG, gate_bias=False))
    assert names["model.layers.1.attn.g_proj.weight"] == (18, 32)
    assert set(names) == {
        "model.embeddings.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{n}_norm.weight" for i in range(2) for n in ("attn", "mlp")),
        *(f"model.layers.{i}.attn.{n}_proj.weight" for i in range(2) for n in "qkvgo"),
        *(f"model.layers.{i}.mlp.{n}_proj.weight" for i in range(2) for n in ("gate", "up", "down")),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 4}, "num_heads (6) must be a multiple of num_kv_heads (4)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"compress_kind": "max"}, "compress_kind must be one of mean, linear, mlp, softmax"),
        ({"compress_stride": 3}, "compress_block (8) must be a multiple of compress_stride (3)"),
        ({"select_count": 2}, "exceed select_count (2)"),
        ({"rope_scaling": {**SCALING, "kind": "ntk"}}, "kind must be one of yarn, dynamic_yarn, dual_chunk, llama3"),
        ({"rope_scaling": {**SCALING, "chunk": 64}}, "chunk is for dual_chunk, which needs it, got 64"),
        ({"rope_scaling": {**SCALING, "kind": "dual_chunk"}}, "chunk is for dual_chunk, which needs it, got 0"),
        ({"rope_scaling": {**DUAL, "chunk": 40}}, "chunk (40) must be a multiple of select_block (16)"),
        ({"rope_scaling": {**DUAL, "chunk": 16}}, "no shorter than window and compress_block"),
        ({"rope_scaling": DUAL, "compress_kind": "linear"}, "learned compression needs compress_rope after or none"),
        ({"rope_scaling": DUAL, "compress_positions": True}, "learned compression needs compress_rope after or none"),
        ({"windw": 5}, "unknown key 'windw'; did you mean 'window'?"),
    ],
)
def test_config_errors_are_one_line(change: dict, words: str) -> None:
    with pytest.raises(ModelError) as error:
        NSAConfig.from_dict(CONFIG.to_dict() | change)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_config_round_trip() -> None:
    config = CONFIGS["yarn"]
    import json

    assert NSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def compiled_step(model: NSAModel, cache: Cache) -> Step:
    step = Step(model, cache)
    if step.compiled is None:
        pytest.skip("no C compiler")
    return step


STEPPED = {name: config for name, config in CONFIGS.items() if not config.branch_kv}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("config", STEPPED.values(), ids=STEPPED)
def test_a_compiled_step_equals_prefill_of_one_token(config: NSAConfig, threads: int) -> None:
    torch.set_num_threads(threads)
    model, ids = random_model(config), random_ids(171)
    expected = model(ids)
    cache = exact_cache(model, 171)
    prefill(model, ids[:150], cache)
    step = compiled_step(model, cache)
    for t in range(150, 171):
        torch.testing.assert_close(step(int(ids[t])), expected[t], atol=2e-5, rtol=1e-4)
    assert cache.length == 171


def test_a_model_with_own_keys_per_branch_is_stepped_by_its_layers() -> None:
    model = random_model(CONFIGS["paper"])
    cache = exact_cache(model, 100)
    expected = model(random_ids(60))
    prefill(model, random_ids(60)[:59], cache)
    step = Step(model, cache)
    assert step.compiled is None
    torch.testing.assert_close(step(int(random_ids(60)[59])), expected[59], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("odd", [33, 64, 97])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_compiled_step_of_each_weight_type_at_any_width(kind: str, odd: int) -> None:
    """Rows that are no whole number of vectors or of chunks, against the same weights in float64."""
    config = replace(CONFIG, hidden_size=odd, intermediate_size=3 * odd + 1, qkv_bias=True)
    model = random_model(config)
    tensors = model.state_dict()
    if kind == "int8":
        tensors = {n: t for n, t in quantize(tensors).items() if not n.endswith("_scale")}
        scales = {n: t for n, t in quantize(model.state_dict()).items() if n.endswith("_scale")}
        for name, scale in scales.items():
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.weight = torch.nn.Parameter(tensors[name.removesuffix("_scale")], requires_grad=False)
            owner.weight_scale = scale
    elif kind == "bfloat16":
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.data = parameter.data.bfloat16()
    truth = random_model(config, torch.float64)
    for name, parameter in truth.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        value = getattr(owner, name.rpartition(".")[2]).double()
        scale = getattr(owner, "weight_scale", None)
        parameter.copy_(value if scale is None or name.endswith("bias") else value * scale[:, None].double())
    ids = random_ids(41)
    cache = exact_cache(model, 60)
    filled = exact_cache(truth, 60)
    prefill(truth, ids[:-1], filled)
    for name, buffer in cache.buffers.items():
        buffer.copy_(filled.buffers[name])
    cache.length = filled.length
    step = compiled_step(model, cache)
    torch.testing.assert_close(step(int(ids[-1])).double(), prefill(truth, ids[-1:], filled), atol=1e-4, rtol=1e-4)


def test_a_compiled_step_writes_nothing_but_its_token() -> None:
    """Poison around the token's rows stays, and nothing behind the filled part is read."""
    model, ids = random_model(CONFIG), random_ids(62)
    expected = model(ids)[-1]
    cache = exact_cache(model, 100)
    for buffer in cache.buffers.values():
        buffer.fill_(torch.nan)
    prefill(model, ids[:-1], cache)
    before = {name: buffer.clone() for name, buffer in cache.buffers.items()}
    torch.testing.assert_close(compiled_step(model, cache)(int(ids[-1])), expected, atol=2e-5, rtol=1e-4)
    for name, buffer in cache.buffers.items():
        changed = ~((buffer == before[name]) | (buffer.isnan() & before[name].isnan()))
        rows = changed.any(-1).any(0).nonzero().flatten().tolist()
        assert rows == ([] if name.endswith("_cmp") else [61]), name


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_into_a_full_cache_is_refused(monkeypatch, captured: bool) -> None:
    """Before anything is written: compiled code and a CUDA graph would write behind the buffers."""
    model = random_model(CONFIG)
    cache = exact_cache(model, 1)
    prefill(model, random_ids(cache.capacity), cache)
    calls = []
    step = Step(model, cache)
    if captured:
        monkeypatch.setattr(step, "captured", SimpleNamespace(run=lambda *args: calls.append(args)))
    with pytest.raises(ValueError, match=f"{cache.capacity} tokens cannot take 1 after {cache.capacity}"):
        step(0)
    assert not calls and cache.length == cache.capacity
