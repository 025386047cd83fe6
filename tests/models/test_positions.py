"""Positions in dual chunks, and a cache whose keys are turned for them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_models import Cache, NSAConfig, prefill
from nsa_models import cache as cache_module
from nsa_models.config import RopeScaling
from nsa_models.positions import chunk_of, positions
from tests.models.tiny import CONFIG, random_model

pytestmark = pytest.mark.usefixtures("one_thread")


def chunked(chunk: int, **changes) -> NSAConfig:
    return replace(CONFIG, rope_scaling=RopeScaling(8.0, 4 * chunk, kind="dual_chunk", chunk=chunk), **changes)


@given(blocks=st.integers(2, 9), token=st.integers(0, 200_000))
def test_distances_are_true_when_near_and_bounded_when_far(blocks: int, token: int) -> None:
    size = blocks * CONFIG.select_block
    config, chunk = chunked(size), token // size
    at = positions(config, torch.arange(token + 1), chunk)
    distance, true = at[-1] - at, token - torch.arange(token + 1)
    near = max(chunk - 1, 0) * size  # the first token of the chunk before the query's
    assert torch.equal(distance[near:], true[near:])
    far = distance[:near].view(-1, CONFIG.select_block)  # whole blocks
    assert (far.diff() == -1).all(), "within a block tokens keep their order"
    assert (far == far[:1]).all() and (far > size - CONFIG.select_block).all() and (distance < 2 * size).all()
    assert positions(config, torch.tensor(token), chunk_of(config, torch.tensor(token))) == at[-1]


def test_without_chunks_tokens_stand_at_their_numbers() -> None:
    token = torch.arange(300)
    assert torch.equal(positions(CONFIG, token, chunk_of(CONFIG, token)), token)


def test_up_to_two_chunks_a_model_reads_as_without() -> None:
    ids = torch.arange(65) * 7 % 97
    plain, model = random_model(CONFIG)(ids), random_model(chunked(32))(ids)
    torch.testing.assert_close(model[:64], plain[:64], rtol=0, atol=0)
    assert (model[64] - plain[64]).abs().max() > 1e-3


@pytest.mark.parametrize("cut", [140, 128, 96, 70])
def test_a_cache_is_cut_back_over_the_ends_of_chunks_bit_for_bit(cut: int) -> None:
    """Keys in bfloat16 are rounded at each turn; what a question turned is put back when it is taken back."""
    model, ids = random_model(chunked(32)), torch.arange(150) * 7 % 97
    cache = Cache.for_model(model, 150)
    prefill(model, ids[:cut], cache)
    before = {name: rows.clone() for name, rows in cache.tensors().items()}
    for _ in range(3):
        prefill(model, ids[cut : min(cut + 50, 150)], cache)
        cache.truncate(cut)
        assert all(torch.equal(rows, before[name]) for name, rows in cache.tensors().items())


@pytest.mark.parametrize("cut", [0, 1, 40, 100, 127])
def test_a_cache_is_cut_back_as_far_as_anyone_likes(cut: int) -> None:
    model, ids = random_model(chunked(32)), torch.arange(300) * 7 % 97
    cache, fresh = (Cache(model.config, 300, dtype=torch.float32) for _ in range(2))
    prefill(model, ids, cache)
    cache.truncate(cut)
    if cut:
        prefill(model, ids[:cut], fresh)
    for name, rows in cache.tensors().items():
        torch.testing.assert_close(rows, fresh.tensors()[name], atol=2e-5, rtol=1e-4)
    assert cache.chunk <= cut // 32
    torch.testing.assert_close(prefill(model, ids[cut:], cache), model(ids)[-1], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_turn_turns_nothing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C leaves keys as they were, and the same tokens can be read again."""
    model, ids = random_model(chunked(32)), torch.arange(150) * 7 % 97
    cache = Cache.for_model(model, 150)
    prefill(model, ids[:96], cache)
    before, calls, rotate = {name: rows.clone() for name, rows in cache.tensors().items()}, [], cache_module.rotate

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return rotate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "rotate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prefill(model, ids[96:], cache)
    assert len(calls) == after + 1 and (cache.length, cache.chunk) == (96, 2)
    assert all(torch.equal(rows, before[name]) for name, rows in cache.tensors().items())
    fresh = Cache.for_model(model, 150)
    prefill(model, ids[:96], fresh)
    assert torch.equal(prefill(model, ids[96:], cache), prefill(model, ids[96:], fresh))
