"""Eq. 5 in Triton, forward and backward: the branches under their gates, each tensor read and written once.

In single operations of PyTorch the sum moves 12 tensors of the size of o, at 64k tokens of 64 heads of 128 in bfloat16
13 GB; here 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.tiles import load_rows, store_rows

ROWS = 16  # (query, head) rows a program


@triton.jit(do_not_specialize=["rows"])
def _forward(cmp, slc, swa, gates, o, rows, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    total = load_rows(cmp + row * DV, there, 0, BDV, DV) * _gate(gates, row, there, 0)
    total += load_rows(slc + row * DV, there, 0, BDV, DV) * _gate(gates, row, there, 1)
    if swa is not None:
        total += load_rows(swa + row * DV, there, 0, BDV, DV) * _gate(gates, row, there, 2)
    store_rows(o + row * DV, there, total, 0, BDV, DV)


@triton.jit
def _gate(gates, row, there, branch: tl.constexpr):
    return tl.load(gates + row * 3 + branch, mask=there, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _backward(
    do, cmp, slc, swa, gates, d_cmp, d_slc, d_swa, d_gates, rows, DV: tl.constexpr, BDV: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    g = load_rows(do + row * DV, there, 0, BDV, DV).to(tl.float32)
    _branch(g, cmp, gates, d_cmp, d_gates, row, there, 0, DV, BDV)
    _branch(g, slc, gates, d_slc, d_gates, row, there, 1, DV, BDV)
    if swa is not None:
        _branch(g, swa, gates, d_swa, d_gates, row, there, 2, DV, BDV)
    else:
        tl.store(d_gates + row * 3 + 2, tl.zeros([ROWS], tl.float32).to(d_gates.dtype.element_ty), mask=there)


@triton.jit
def _branch(g, o, gates, do, d_gates, row, there, branch: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr):
    store_rows(do + row * DV, there, g * _gate(gates, row, there, branch), 0, BDV, DV)
    d_gate = tl.sum(g * load_rows(o + row * DV, there, 0, BDV, DV), 1)
    tl.store(d_gates + row * 3 + branch, d_gate.to(d_gates.dtype.element_ty), mask=there)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cmp, slc, swa, gates):
        gates, o = gates.contiguous(), torch.empty_like(cmp)
        rows, DV = cmp.shape[0] * cmp.shape[1], cmp.shape[2]
        ctx.grid = (triton.cdiv(rows, ROWS),)
        ctx.shape = dict(rows=rows, DV=DV, BDV=max(16, triton.next_power_of_2(DV)), ROWS=ROWS, num_warps=4)
        _forward[ctx.grid](cmp, slc, swa, gates, o, **ctx.shape)
        ctx.save_for_backward(cmp, slc, swa, gates)
        return o

    @staticmethod
    def backward(ctx, do):
        saved = ctx.saved_tensors
        gradients = [None if x is None else torch.empty_like(x) for x in saved]
        _backward[ctx.grid](do.contiguous(), *saved, *gradients, **ctx.shape)
        return tuple(gradients)


def combine(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor | None, gates: Tensor) -> Tensor:
    """g_cmp o_cmp + g_slc o_slc + g_swa o_swa, summed in float32. o_*: (T, HQ, Dv) contiguous; o_swa None = no window;
    gates: (T, HQ, 3). Differentiable in all.
    """
    return _Combine.apply(o_cmp, o_slc, o_swa, gates)
