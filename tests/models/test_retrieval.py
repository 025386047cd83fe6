"""Where a question's words lead: softmax mass per block of the document, whatever the distance."""

import json
from dataclasses import replace

import pytest
import torch

from nsa_models import Cache, NSAConfig, prefill
from nsa_models.config import RopeScaling
from nsa_models.errors import ModelError
from nsa_models.retrieval import DISTANCE, RetrievalMass, block_mass
from nsa_models.rope import Rope, rotate
from nsa_models.transformer import NSAModel

CONFIG = NSAConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    max_position_embeddings=4096,
    rope_scaling=RopeScaling(16.0, 256),
    compress_block=8,
    compress_stride=8,
    select_block=8,
    select_count=12,
    initial_blocks=1,
    local_blocks=2,
    retrieval_heads=((1, 0), (1, 5)),
    reread_heads=((1, 2),),
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_mass_of_blocks_is_that_of_a_softmax() -> None:
    q, k = random(5, 4), random(77, 4)
    p = torch.nn.functional.pad(torch.softmax(q @ k.T / 2, -1), (0, 3)).view(5, 10, 8)
    torch.testing.assert_close(block_mass(q, k, 8), p.sum((0, 2)))


@pytest.mark.parametrize("factor", [1.0, 16.0])
@pytest.mark.parametrize("start", [0, 3000])
def test_distance_does_not_matter(factor: float, start: int) -> None:
    """The same words and keys, rotated to their places with any scaling, give what they give DISTANCE apart."""
    q, k, rope = random(5, 6, 4), random(40, 2, 4), Rope(CONFIG, factor)
    places = torch.arange(45) + (torch.arange(45) >= 40) * start  # the words stand `start` behind the document
    rotated = rotate(k, *rope.angles(places[:40], torch.float32))
    asked = rotate(q, *rope.angles(places[40:], torch.float32))
    retrieval = RetrievalMass(CONFIG, 40)
    retrieval.add(1, asked, torch.cat([rotated, random(5, 2, 4)]), rope, places)
    near = rotate(q, *Rope(CONFIG, CONFIG.rope_factor(DISTANCE)).angles(torch.tensor([DISTANCE]), torch.float32))
    expected = torch.stack([block_mass(near[:, head], k[:, head // 3], 8) for head in (0, 5)]).double()
    expected[:, 0] = 0
    torch.testing.assert_close(retrieval.mass, expected, atol=1e-4, rtol=1e-3)


def test_only_the_named_heads_count_and_not_the_first_block() -> None:
    retrieval = RetrievalMass(CONFIG, 80)
    q, k, rope = torch.zeros(1, 6, 4), torch.zeros(81, 2, 4), Rope(CONFIG)
    retrieval.add(0, q, k, rope, torch.arange(81))
    assert retrieval.mass.sum() == 0
    retrieval.add(1, q, k, rope, torch.arange(81))
    assert not retrieval.mass[:, 0].any()
    torch.testing.assert_close(retrieval.mass[:, 1:], torch.full((2, 9), 0.1, dtype=torch.float64))  # 10 blocks
    torch.testing.assert_close(retrieval.lift[1:], torch.ones(9, dtype=torch.float64))


def test_places_may_be_of_another_size_than_selected_blocks() -> None:
    retrieval = RetrievalMass(replace(CONFIG, retrieval_block=32), 80)
    retrieval.add(1, torch.zeros(1, 6, 4), torch.zeros(81, 2, 4), Rope(CONFIG), torch.arange(81))
    expected = torch.tensor([[0, 32 / 80, 16 / 80]] * 2, dtype=torch.float64)
    torch.testing.assert_close(retrieval.mass, expected)
    with pytest.raises(ModelError, match="retrieval_block must be at least 0, got -1"):
        replace(CONFIG, retrieval_block=-1)


def test_what_two_heads_look_at_stands_above_what_draws_one() -> None:
    retrieval = RetrievalMass(CONFIG, 80)
    retrieval.mass[0] = torch.tensor([0, 8, 4, 0, 0, 0, 0, 0, 3, 3])  # an even share is 2
    retrieval.mass[1] = torch.tensor([0, 0, 4, 2, 2, 2, 2, 2, 2, 2])
    assert retrieval.lift[2] == pytest.approx(2)
    assert retrieval.lift[1] == pytest.approx((5 * 1) ** 0.5 - 1)
    assert retrieval.lift.argmax() == 2


def test_without_named_heads_all_count() -> None:
    retrieval = RetrievalMass(replace(CONFIG, retrieval_heads=()), 80)
    for layer in range(2):
        retrieval.add(layer, torch.zeros(1, 6, 4), torch.zeros(81, 2, 4), Rope(CONFIG), torch.arange(81))
    torch.testing.assert_close(retrieval.mass[:, 1:], torch.full((12, 9), 0.1, dtype=torch.float64))


def test_only_counted_tokens_count_in_whatever_chunks_they_come() -> None:
    q, k, rope = random(7, 6, 4), random(47, 2, 4), Rope(CONFIG)
    counted = [False, True, True, False, False, True, False]
    retrieval, chosen = RetrievalMass(CONFIG, 40, counted), RetrievalMass(CONFIG, 40)
    for start, stop in ((0, 2), (2, 3), (3, 5), (5, 7)):
        retrieval.add(1, q[start:stop], k[: 40 + stop], rope, torch.arange(40 + stop))
    for i in (1, 2, 5):
        chosen.add(1, q[i : i + 1], k[: 41 + i], rope, torch.arange(41 + i))
    torch.testing.assert_close(retrieval.mass, chosen.mass)


def test_without_a_document_nothing_is_found() -> None:
    retrieval = RetrievalMass(CONFIG, 0)
    retrieval.add(1, torch.zeros(4, 6, 4), torch.zeros(4, 2, 4), Rope(CONFIG), torch.arange(4))
    assert retrieval.mass.shape == (2, 0) and retrieval.lift.shape == (0,)


def test_the_engine_collects_what_is_prefilled() -> None:
    model = NSAModel(CONFIG)
    for p in model.parameters():
        p.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    cache = Cache.for_model(model, 90)
    retrieval = RetrievalMass(CONFIG, 70)
    ids = torch.arange(80) % 50
    prefill(model, ids[:70], cache)
    prefill(model, ids[70:], cache, retrieval=retrieval)
    assert 0 < retrieval.mass.sum() < 10 * 2  # of queries * heads, the first block takes the rest


@pytest.mark.parametrize("heads", [[[2, 0]], [[0, 6]], [[-1, 0]], [[0]], [[0, 1.5]], "1.0", 5, [[True, 0]], [3]])
@pytest.mark.parametrize("name", ["retrieval_heads", "reread_heads"])
def test_heads_that_do_not_exist_are_one_line(name: str, heads: object) -> None:
    with pytest.raises(ModelError, match=rf"^config: {name} must be a list of \[layer, query head\], below"):
        NSAConfig.from_dict(CONFIG.to_dict() | {name: heads})


def test_heads_survive_a_round_trip() -> None:
    assert NSAConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
