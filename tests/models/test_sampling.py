"""Sampling filters against their definitions."""

import pytest
import torch

from nsa_models.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.1, 0.5, 0.25, 0.05, 0.1]).log()


def drawn(sampling: Sampling, times: int = 400) -> set[int]:
    sampler = Sampler(sampling)
    return {sampler._pick(LOGITS) for _ in range(times)}


def test_greedy_is_the_default() -> None:
    assert Sampler(Sampling()).pick(LOGITS) == 1


def test_filters_keep_what_they_say() -> None:
    assert drawn(Sampling(temperature=1)) == {0, 1, 2, 3, 4}
    assert drawn(Sampling(temperature=1, top_k=2)) == {1, 2}
    assert drawn(Sampling(temperature=1, top_p=0.75)) == {1, 2}
    assert drawn(Sampling(temperature=1, top_p=0.76)) in ({0, 1, 2}, {1, 2, 4})
    assert drawn(Sampling(temperature=1, min_p=0.3)) == {1, 2}
    assert drawn(Sampling(temperature=1, top_p=0.0)) == {1}


def test_seed_decides() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed))
        return [sampler.pick(LOGITS) for _ in range(30)]

    assert run(7) == run(7) != run(8)


def test_frequencies_follow_the_temperature() -> None:
    sampler = Sampler(Sampling(temperature=0.5, seed=1))
    picks = torch.tensor([sampler._pick(LOGITS) for _ in range(3000)])
    expected = torch.softmax(LOGITS / 0.5, 0)
    assert ((torch.bincount(picks, minlength=5) / 3000 - expected).abs() < 0.03).all()


def test_repeat_penalty_lowers_what_was_said() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    sampler = Sampler(Sampling(repeat_penalty=1.5))
    assert [sampler.pick(logits) for _ in range(2)] == [0, 1]
    assert Sampler(Sampling(repeat_penalty=1.5), history=[0, 1]).pick(logits) == 0  # 1.33 still beats the rest


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 1.5}, {"max_tokens": 0}, {"repeat_penalty": 0}])
def test_nonsense_is_refused(values: dict) -> None:
    with pytest.raises(ValueError, match="must|at least"):
        Sampling(**values)
