"""Where queries look: softmax mass per chosen block, against a plain softmax over all keys."""

import torch

from nsa_models import Cache, NSAConfig, prefill
from nsa_models.selection import SelectionMass, block_mass
from nsa_models.transformer import NSAModel

CONFIG = NSAConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    compress_block=8,
    compress_stride=8,
    select_block=8,
    select_count=12,
    initial_blocks=1,
    local_blocks=2,
)


def test_mass_is_softmax_when_every_block_is_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(5, 6, 4, generator=generator), torch.randn(77, 2, 4, generator=generator)
    index = torch.arange(10).expand(5, 2, 10)
    mass = block_mass(q, k, index, 8, offset=72)
    keys = k.repeat_interleave(3, 1)
    scores = torch.einsum("thd,shd->ths", q, keys) / 2
    scores = scores.masked_fill(torch.arange(77) > torch.arange(72, 77)[:, None, None], -torch.inf)
    p = torch.nn.functional.pad(torch.softmax(scores, -1), (0, 3)).view(5, 2, 3, 10, 8)
    torch.testing.assert_close(mass, p.sum((2, 4)))


def test_absent_blocks_weigh_nothing() -> None:
    q, k = torch.randn(1, 6, 4), torch.randn(40, 2, 4)
    mass = block_mass(q, k, torch.tensor([[[0, 4, -1], [2, 4, -1]]]), 8, offset=39)
    assert (mass[..., 2] == 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 3.0))  # three heads a group, one each


def test_forced_blocks_are_left_out_and_an_even_spread_is_expected() -> None:
    selection = SelectionMass(CONFIG, 80)
    selection.add(torch.zeros(1, 6, 4), torch.zeros(80, 2, 4), torch.arange(10).expand(1, 2, 10), 79)
    assert selection.mass[0] == 0 and (selection.mass[8:] == 0).all()
    torch.testing.assert_close(selection.mass[1:8], torch.full((7,), 0.6, dtype=torch.float64))  # 6 heads, 10 blocks
    torch.testing.assert_close(selection.expected, selection.mass)


def test_calibration_scales_to_the_queries_seen() -> None:
    asked, neutral = SelectionMass(CONFIG, 80), SelectionMass(CONFIG, 80)
    asked.queries, neutral.queries = 30, 10
    neutral.mass[3] = 2.0
    asked.calibrate(neutral)
    assert asked.expected[3] == 6.0 and asked.expected.sum() == 6.0
    before = asked.expected.clone()
    asked.calibrate(SelectionMass(CONFIG, 80))  # nothing was read: the expectation stays
    assert torch.equal(asked.expected, before)


def test_the_engine_collects_every_layer() -> None:
    model = NSAModel(CONFIG)
    for p in model.parameters():
        p.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    cache = Cache.for_model(model, 90)
    selection = SelectionMass(CONFIG, 90)
    ids = torch.arange(80) % 50
    prefill(model, ids[:70], cache)
    prefill(model, ids[70:], cache, selection=selection)
    assert selection.queries == 2 * 10
    free = selection.mass.sum()
    assert 0 < free < 2 * 10 * 6  # of layers * queries * heads, the forced blocks take the rest
