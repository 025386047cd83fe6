"""The loss that teaches compression what to choose: zero where compressed keys choose as dense attention reads."""

from dataclasses import replace

import pytest
import torch

from nsa_kernels import reference
from nsa_models.training.batch import Example, pack
from nsa_models.training.config import Loss, Optimizer
from nsa_models.training.forward import Keys, hidden_states
from nsa_models.training.loop import make_optimizer
from nsa_models.training.selection import SelectionLoss, divergence, free_blocks, selection_loss
from tests.models.tiny import CONFIG, random_model

EXACT = replace(CONFIG, compress_block=1, compress_stride=1, select_block=8, select_count=4, window=8)
LENGTHS = [150, 20, 97]


def batch(lengths=LENGTHS, answer=None):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]
    return pack([Example(s, None if answer is None else [range(answer, len(s))]) for s in ids])


def loss_of(config, dtype=torch.float64, **options):
    weights = random_model(config, dtype).state_dict()
    return selection_loss(config, weights, batch(**options), dtype)


@pytest.mark.parametrize("place", ["before", "none"])
def test_keys_of_single_tokens_choose_as_dense_attention_reads(place):
    """Un-roped keys do not see what rotated ones do."""
    loss = loss_of(replace(EXACT, compress_rope=place))
    assert abs(loss) < 1e-12 if place == "before" else loss > 1e-3


@pytest.mark.parametrize("changes", [{}, dict(branch_kv=True, compress_rope="after"), dict(compress_positions=True)])
def test_means_of_blocks_do_not(changes):
    config = replace(EXACT, compress_block=8, compress_stride=4, **changes)
    assert loss_of(config) > 1e-3


def test_the_loss_is_that_of_the_equations():
    """One layer's queries one by one, with the reference's own compressed attention and importance."""
    config = replace(EXACT, compress_block=8, compress_stride=4, num_hidden_layers=1)
    weights, ids = random_model(config, torch.float64).state_dict(), batch([90]).ids
    seen: list[Keys] = []
    hidden_states(config, weights, ids, [90], dtype=torch.float64, watch=lambda _, keys: seen.append(keys))
    (keys,), variant = seen, config.variant
    k_cmp = reference.compress(keys.k, variant)
    HKV, blocks, total, weight = config.num_kv_heads, variant.block_count(90), 0.0, 0.0
    for t in (32, 40, 77, 89):
        q = keys.q[t : t + 1]
        _, p_cmp = reference.compressed_attention(q, k_cmp, k_cmp, variant, t)
        got = reference.block_importance(p_cmp, HKV, variant, blocks)[0]
        for h in range(HKV):
            G = q.shape[1] // HKV
            p = sum((q[0, h * G + g] @ keys.k[: t + 1, h].T * q.shape[-1] ** -0.5).softmax(0) for g in range(G))
            free = range(config.initial_blocks, t // 8 - config.local_blocks + 1)
            wanted = torch.stack([p[8 * b : 8 * b + 8].sum() for b in free])
            mine = got[h, free.start : free.stop]
            total += (wanted * ((wanted / wanted.sum()).log() - (mine / mine.sum()).log())).sum()
            weight += wanted.sum()
    torch.testing.assert_close(divergence(config, keys, torch.tensor([32, 40, 77, 89])), total / weight)


def test_forced_and_future_blocks_are_not_free():
    free = free_blocks(replace(EXACT, initial_blocks=2, local_blocks=1), torch.tensor([7, 40, 79]), 10)
    assert free.int().tolist() == [[0] * 10, [0, 0, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]]


def test_sequences_without_a_choice_have_no_loss():
    assert loss_of(EXACT, lengths=[32, 5]) is None
    torch.testing.assert_close(loss_of(EXACT, lengths=[33]), torch.tensor(0.0, dtype=torch.float64))


def test_queries_of_answers_are_compared():
    """More rows than are sampled: the loss depends on where the answer starts."""
    config = replace(EXACT, compress_block=8, compress_stride=4)
    losses = {loss_of(config, lengths=[700], answer=answer).item() for answer in (None, 650, 660)}
    assert len(losses) == 3


def test_compression_alone_learns_and_chooses_better():
    config = replace(EXACT, compress_block=8, compress_stride=8, compress_kind="linear")
    model = random_model(config, torch.float32)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if "compress" in name:
            tensor.data.copy_((torch.eye(config.head_dim) / 8).repeat(8, 1))
    learned = {name: tensor for name, tensor in weights.items() if ".compress_k." in name}
    optimizer = make_optimizer(Optimizer(nsa_rate=1e-2), learned)
    losses = []
    for _ in range(20):
        loss = selection_loss(config, weights, batch(), torch.float32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {name for name, tensor in weights.items() if tensor.grad is not None} == set(learned)
    assert losses[-1] < 0.7 * losses[0]


def test_it_needs_no_gradient_of_the_model():
    assert not Loss(text=0, answer=0, select=1).next_token and Loss(text=0, select=1).next_token


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_with_gradients_teaches_queries_and_keys_too(recompute):
    """The same loss as by itself; means, which have nothing to learn, choose better by what they are means of."""
    config = replace(EXACT, compress_block=8, compress_stride=8)
    start = random_model(config, torch.float32).state_dict()
    weights = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    learned = {n: t for n, t in weights.items() if n.rpartition(".")[0].endswith(("q_proj", "k_proj"))}
    optimizer = torch.optim.Adam(learned.values(), 3e-3)
    losses = []
    for _ in range(20):
        watch = SelectionLoss(config, batch())
        hidden_states(config, weights, batch().ids, LENGTHS, dtype=torch.float32, recompute=recompute, watch=watch)
        loss = watch.mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(selection_loss(config, start, batch(), torch.float32).item(), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in learned.values())
