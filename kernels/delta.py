"""sum(o * do) of every row, which the gradient of a softmax subtracts, in Triton: each tensor is read once.

In single operations of PyTorch, each of which writes a float32 tensor, 15 GB are moved a branch at 64k tokens of 64
heads of 128 in bfloat16; here 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.tiles import load_rows

ROWS = 16  # (query, head) rows a program


@triton.jit(do_not_specialize=["T"])
def _delta(
    o, do, delta, T, HQ, o_t, o_h, do_t, do_h, G: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, t, head = row < T * HQ, row // HQ, row % HQ
    x = load_rows(o + t * o_t + head * o_h, there, 0, BDV, DV).to(tl.float32)
    y = load_rows(do + t * do_t + head * do_h, there, 0, BDV, DV).to(tl.float32)
    tl.store(delta + (head // G * T + t) * G + head % G, tl.sum(x * y, 1), mask=there)


def delta(o: Tensor, do: Tensor, G: int) -> Tensor:
    """(HQ / G, T, G) in float32. o, do: (T, HQ, Dv), any strides but 1 in the last dimension."""
    T, HQ, DV = o.shape
    found = torch.empty(HQ // G, T, G, device=o.device, dtype=torch.float32)
    _delta[(triton.cdiv(T * HQ, ROWS),)](
        o, do, found, T, HQ, *o.stride()[:2], *do.stride()[:2],
        G=G, DV=DV, BDV=max(16, triton.next_power_of_2(DV)), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return found
