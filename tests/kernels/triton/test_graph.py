"""The decode step that a CUDA graph holds, run operation by operation, against `model.advance`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsa_models import Cache, NSAConfig
from nsa_models.config import RopeScaling
from nsa_models.transformer import NSAModel

CONFIG = NSAConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position_embeddings=256,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    select_count=3,
    window=12,
)
CONFIGS = {
    "mean": CONFIG,
    "tied-biased-yarn": replace(CONFIG, tie_word_embeddings=True, qkv_bias=True, rope_scaling=RopeScaling(8.0, 32)),
    "dual-chunk": replace(CONFIG, rope_scaling=RopeScaling(8.0, 64, kind="dual_chunk", chunk=32)),
    "linear-roped-after": replace(CONFIG, compress_kind="linear", compress_positions=True, compress_rope="after"),
    "softmax": replace(CONFIG, compress_kind="softmax"),
    "softmax-roped-after": replace(CONFIG, compress_kind="softmax", compress_positions=True, compress_rope="after"),
    "mlp-unroped": replace(CONFIG, compress_kind="mlp", compress_positions=True, compress_rope="none"),
    "paper": replace(CONFIG, branch_kv=True, compress_kind="mlp", compress_positions=True, compress_rope="after"),
    "branches-roped-before": replace(CONFIG, branch_kv=True, window=0),
}


def random_model(config: NSAConfig, generator: torch.Generator, device: str | torch.device = "cpu") -> NSAModel:
    model = NSAModel(config, device=device)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name))
    return model


@pytest.mark.parametrize("dense", [False, True], ids=["nsa", "dense"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_are_the_models(device, config: NSAConfig, dense: bool) -> None:
    """Over a block's completion: tokens 67 and 71 complete a compression block, 65 begins a selection block."""
    from nsa_models.graph import DeviceStep, supports

    generator = torch.Generator().manual_seed(0)
    model = random_model(config, generator, device)
    ids = torch.randint(61, (69,), generator=generator)
    mine, theirs = (Cache(config, 80, device, torch.float32) for _ in range(2))
    assert supports(model, mine)
    for cache in (mine, theirs):
        for buffer in cache.buffers.values():
            buffer.fill_(torch.nan)
        model.advance(ids[:64], cache, dense)
    step = DeviceStep(model, mine, dense)
    for length, token in enumerate(ids[64:].tolist(), 64):
        step.token.fill_(token)
        step.length.fill_(length)
        mine.length = length
        mine.turn()
        got = step.run()
        expected = model.logits(model.advance(ids[length : length + 1], theirs, dense))[0]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    for name, buffer in mine.buffers.items():
        torch.testing.assert_close(buffer, theirs.buffers[name], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_warm_up_touches_nothing(device) -> None:
    from nsa_models.graph import DeviceStep

    cache = Cache(CONFIG, 32, device, torch.float32)
    for buffer in cache.buffers.values():
        buffer.fill_(7)
    step = DeviceStep(random_model(CONFIG, torch.Generator().manual_seed(0), device), cache)
    step.length.fill_(-1)
    step.run()
    assert step.length.item() == 0
    assert all((buffer == 7).all() for buffer in cache.buffers.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_captured_step_goes_on_after_the_cache_is_cut(monkeypatch) -> None:
    """With a graph that repeats in Python what it holds: warming up leaves the cache as it was, and a graph serves
    whatever length the cache has been cut to and filled to since.
    """
    from nsa_models.graph import CapturedStep

    class Graph:
        def replay(self) -> None:
            captured.logits.copy_(captured.step.run())

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        """Nothing that is captured is run."""
        assert all(torch.equal(buffer, before[name]) for name, buffer in mine.buffers.items())
        yield
        for name, buffer in mine.buffers.items():
            buffer.copy_(before[name])

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stub in dict(Stream=lambda _: stream, current_stream=lambda _: stream, CUDAGraph=Graph).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    for name, stub in dict(stream=nullcontext, device=nullcontext, graph=capture).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    config = replace(CONFIG, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    model = random_model(config, generator)
    ids = torch.randint(61, (48,), generator=generator)
    mine, theirs = (Cache(config, 48, "cpu", torch.float32) for _ in range(2))
    for cache in (mine, theirs):
        model.advance(ids[:40], cache)
    before = {name: buffer.nan_to_num_(7).clone() for name, buffer in mine.buffers.items()}
    captured = CapturedStep(model, mine)
    for length in (40, 41, 33, 47):  # cut to 33; filled by a prompt to 47
        for cache in (mine, theirs):
            cache.truncate(min(cache.length, length))
            if cache.length < length:
                model.advance(ids[cache.length : length], cache)
        expected = model.logits(model.advance(ids[length : length + 1], theirs))[0]
        got = captured.run(int(ids[length]), length)
        mine.length += 1
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_step_is_the_same() -> None:
    from nsa_models import Sampling, decode, prefill

    model = NSAModel(CONFIG, device="cuda", dtype=torch.bfloat16)
    for p in model.parameters():
        p.normal_(0, 0.3)
    cache = Cache.for_model(model, 128)
    logits = prefill(model, list(range(50)), cache)
    tokens = list(decode(model, cache, logits, Sampling(max_tokens=20)))
    cache.truncate(50)
    for token in tokens[:-1]:
        assert token == int(logits.argmax())
        logits = model.logits(model.advance(torch.tensor([token]), cache))[0]
