"""Work split over threads by rows or by tasks, on a CPU."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
Item = TypeVar("Item")

MIN_ROWS = 128  # below this, torch's own threads inside each operation do as well


def over_rows(function: Callable[[slice], T], rows: int, device: torch.device) -> list[T]:
    """function(slice) for consecutive slices that cover `rows` rows, one a thread; results in order. On a GPU, which
    splits its own work, one slice.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    parts = max(1, min(threads, rows // MIN_ROWS))
    size = -(-rows // parts)
    return over_tasks(function, [slice(start, min(start + size, rows)) for start in range(0, rows, size)])


def over_tasks(function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    """[function(item) for item in items] on as many threads as torch may use, each with one-threaded operations.

    Operations release the interpreter lock; tasks should last a millisecond or more.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) <= 1:
        return [function(item) for item in items]
    grad = torch.is_grad_enabled()

    def run(item: Item) -> T:
        with torch.set_grad_enabled(grad):  # grad mode is per thread
            return function(item)

    # The thread count of OpenMP is per thread, MKL's is global: both go to one, and MKL's back afterwards.
    torch.set_num_threads(1)
    futures = [_pool(threads, os.getpid()).submit(run, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:  # nothing runs on after an error or Ctrl-C
        for future in futures:
            future.cancel()
        wait(futures)
        torch.set_num_threads(threads)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay: new ones for every call made a layer's products 25 % slower. process: a fork has none yet."""
    return ThreadPoolExecutor(threads, "nsa", torch.set_num_threads, (1,))
