"""Work over threads: order, and the thread count that is found best and given back."""

import time

import pytest
import torch

from nsa_kernels.rows import FewerThreads, over_rows, over_tasks


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 127, 128, 1000, 1001])
def test_slices_cover_the_rows_in_order(rows: int) -> None:
    parts = over_rows(lambda part: list(range(part.start, part.stop)), rows)
    assert sum(parts, []) == list(range(rows))


def test_an_error_in_a_task_is_raised_and_threads_are_restored() -> None:
    with pytest.raises(ZeroDivisionError):
        over_tasks(lambda n: 1 // n, [2, 1, 0])


@pytest.mark.parametrize("quick", [1, 3])
def test_the_faster_thread_count_is_kept_and_looked_at_again(quick: int) -> None:
    used: list[int] = []

    def work() -> None:
        used.append(torch.get_num_threads())
        time.sleep(0.0 if used[-1] == quick else 0.003)

    threads = FewerThreads()
    for _ in range(2 * FewerThreads.AGAIN):
        threads.run(work)
    other = 4 - quick
    assert used.count(other) <= 4  # the first run, and one look per round
    assert sorted(used[1:3]) == sorted(used[33:35]) == [1, 3]


def test_an_interrupted_run_gives_the_threads_back() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    threads = FewerThreads()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            threads.run(interrupt)
