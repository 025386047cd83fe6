"""Batches that are made ahead come in order, each once, and a mistake in one reaches whoever trains."""

import threading

import pytest

from nsa_models.training.loop import ahead


def test_the_next_is_made_while_the_last_is_used():
    made = [threading.Event() for _ in range(4)]

    def make(step: int, index: int) -> int:
        made[index].set()
        return 10 * step + index

    batches = ahead(make, [(0, 0), (0, 1), (1, 2), (1, 3)])
    for expected, following in ((0, 1), (1, 2), (12, 3)):
        assert next(batches) == expected and made[following].wait(60)
    assert list(batches) == [13]
    assert list(ahead(make, [])) == []


def test_only_one_is_made_ahead():
    made = []
    batches = ahead(lambda step, index: made.append(index), [(0, i) for i in range(9)])
    next(batches)
    batches.close()  # waits for the one that is being made
    assert made in ([0], [0, 1])


def test_a_mistake_is_raised_where_its_batch_was_due():
    def make(step: int, index: int) -> int:
        if index == 1:
            raise OSError("gone")
        return index

    batches = ahead(make, [(0, 0), (0, 1), (0, 2)])
    assert next(batches) == 0
    with pytest.raises(OSError, match="gone"):
        next(batches)
