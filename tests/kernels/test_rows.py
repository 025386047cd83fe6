"""Work over threads: order, and the thread count given back."""

import pytest
import torch

from nsa_kernels.rows import over_rows, over_tasks


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 127, 128, 1000, 1001])
def test_slices_cover_the_rows_in_order(rows: int) -> None:
    parts = over_rows(lambda part: list(range(part.start, part.stop)), rows, torch.device("cpu"))
    assert sum(parts, []) == list(range(rows))


def test_a_gpu_gets_all_rows_at_once() -> None:
    assert over_rows(lambda part: part, 1000, torch.device("cuda")) == [slice(0, 1000)]


def test_an_error_in_a_task_is_raised_and_threads_are_restored() -> None:
    with pytest.raises(ZeroDivisionError):
        over_tasks(lambda n: 1 // n, [2, 1, 0])
