"""H2O, Quest and StreamingLLM: all of them are full attention while the budget lasts, and each what its paper says."""

import pytest
import torch

from nsa_kernels import reference
from nsa_models import Cache
from nsa_models.comparators import COMPARATORS, HeavyHitters, Quest, Streaming, masked_attention
from nsa_models.config import NSAConfig
from tests.models.tiny import random_model

CONFIG = NSAConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=16
)


def inputs(T: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(T, heads, width, generator=generator) for heads, width in ((4, 8), (2, 8), (2, 6))]


def attend(method, q, k, v, cuts=(), layer: int = 2) -> torch.Tensor:
    """In pieces that end at `cuts`, as prefill and decode do."""
    borders = [0, *cuts, q.shape[0]]
    return torch.cat([method(layer, q[a:b], k[:b], v[:b], a) for a, b in zip(borders, borders[1:], strict=False)])


@pytest.mark.parametrize("name", COMPARATORS)
def test_with_budget_for_all_it_is_full_attention(name):
    q, k, v = inputs(150)
    expected = reference.dense_attention(q.double(), k.double(), v.double())
    got = attend(COMPARATORS[name](CONFIG, 160), q, k, v, cuts=(97, 98, 149))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", COMPARATORS)
def test_what_comes_later_changes_nothing_and_nothing_unread_counts(name):
    q, k, v = inputs(200)
    method = COMPARATORS[name]
    full = attend(method(CONFIG, 48), q, k, v)
    torch.testing.assert_close(attend(method(CONFIG, 48), q[:128], k[:128], v[:128]), full[:128])
    dense = reference.dense_attention(q, k, v)
    assert (full - dense).abs().max() > 1e-2, "a budget of 48 leaves something out"


@pytest.mark.parametrize("name", ["quest", "streaming"])
def test_cutting_into_pieces_changes_nothing(name):
    q, k, v = inputs(200)
    method = COMPARATORS[name](CONFIG, 48)
    torch.testing.assert_close(attend(method, q, k, v, cuts=(1, 64, 65, 130)), attend(method, q, k, v))


def test_streaming_sees_sinks_and_the_window():
    q, k, v = inputs(100)
    got = Streaming(CONFIG, 24)(2, q, k, v, 0)
    t = 70
    seen = [s for s in range(t + 1) if s < 4 or s > t - 20]
    assert len(seen) == 24
    expected = reference.dense_attention(q[t : t + 1], k[seen], v[seen], offset=23)
    torch.testing.assert_close(got[t : t + 1], expected, rtol=1e-5, atol=1e-5)


def test_quest_reads_the_pages_with_the_highest_bounds_of_its_group():
    q, k, v = inputs(96)
    got = Quest(CONFIG, 48)(2, q, k, v, 0)  # 3 pages of 16
    t, kv = 80, 1
    group, pages = q[t, 2 * kv : 2 * kv + 2, None], k[:80, kv].view(5, 16, 8)
    bound = torch.maximum(group * pages.amin(1), group * pages.amax(1)).sum((0, 2))
    chosen = sorted(bound.topk(2).indices.tolist())
    seen = [s for page in chosen for s in range(16 * page, 16 * page + 16)] + [80]
    p = torch.softmax(group[:, 0] @ k[seen, kv].T * 8**-0.5, -1)
    torch.testing.assert_close(got[t, 2 * kv : 2 * kv + 2], p @ v[seen, kv], rtol=1e-5, atol=1e-5)


def test_query_heads_of_a_group_read_the_same_within_the_budget():
    """What a key head is asked for is what a step reads: query heads that choose alone read up to G budgets."""
    q, k, _ = inputs(160)
    v = torch.eye(160)[:, None].expand(160, 2, 160)  # what comes out says what was read
    read = Quest(CONFIG, 48)(2, q, k, v, 0).unflatten(1, (2, 2)) > 0
    assert torch.equal(read[:, :, 0], read[:, :, 1])
    assert read.sum(-1).max() == 48
    assert not torch.equal(read[-1, 0], read[-1, 1]), "key heads choose for themselves"


def test_heavy_hitters_keep_recent_tokens_and_those_attended_most():
    q, k, v = inputs(128)
    k[5] = 3 * q[:, ::2].mean(0)  # a token that many look at
    k[5, 0], k[5, 1] = q[10:64, 0].mean(0) * 20, q[10:64, 2].mean(0) * 20
    method = HeavyHitters(CONFIG, 32)
    attend(method, q, k, v)
    tokens, mass = method.kept[2]
    assert tokens.shape == mass.shape == (2, 32)
    for head in range(2):
        assert set(range(112, 128)) <= set(tokens[head].tolist()), "the recent half"
        assert tokens[head].tolist() == sorted(set(tokens[head].tolist()))
    # after the first 64 tokens: the heavy half is the top 16 by mass, computed here from full attention
    first = HeavyHitters(CONFIG, 32)
    first(2, q[:64], k[:64], v[:64], 0)
    scores = torch.einsum("thd,shd->hts", q[:64, :2], k[:64, :1].expand(-1, 2, -1)) * 8**-0.5
    p = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf).softmax(-1).sum((0, 1))
    assert set(first.kept[2][0][0].tolist()) == set(p[:48].topk(16).indices.tolist()) | set(range(48, 64))


def test_a_decode_step_never_reads_more_than_the_budget():
    q, k, v = inputs(200)
    method = HeavyHitters(CONFIG, 32)
    attend(method, q, k, v, cuts=range(150, 200))
    assert method.kept[2][0].shape[1] == 32


def test_masked_attention_in_pieces(monkeypatch):
    from nsa_models import comparators

    q, k, v = inputs(90)
    seen = torch.rand(90, 2, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    seen |= torch.eye(90, dtype=torch.bool)[:, None]
    whole = masked_attention(q, k, v, 0, lambda rows: seen[rows])
    monkeypatch.setattr(comparators, "MOST_SCORES", 90 * 4 * 7)
    torch.testing.assert_close(masked_attention(q, k, v, 0, lambda rows: seen[rows]), whole)


def test_a_model_reads_through_it():
    model = random_model(CONFIG)
    ids = torch.randint(40, (130,), generator=torch.Generator().manual_seed(1))
    caches = [Cache(CONFIG, 130, dtype=torch.float32) for _ in range(3)]
    dense = model.advance(ids, caches[0], dense=True)
    through = model.advance(ids, caches[1], attention=Streaming(CONFIG, 200))
    torch.testing.assert_close(through, dense, rtol=1e-4, atol=1e-4)
    assert (model.advance(ids, caches[2], attention=Streaming(CONFIG, 8)) - dense).abs().max() > 1e-2
