"""What the Triton kernels share: how a head's width is cut into tiles, and loading and storing one tile.

`tl.arange` takes powers of two only. A width of 192 as 128 + 64 wastes nothing, where 256 would waste a quarter of
every product.

Kernels do not specialize lengths (`do_not_specialize`): Triton would compile all of them again, seconds each, for a
prompt whose length is no multiple of 16, and once more where one is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def split_width(width: int) -> tuple[int, int]:
    """Two tile widths, powers of two of at least 16, that cover `width`; the second is 0 where one does as well."""
    whole = max(16, triton.next_power_of_2(width))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(max(1, width - half)))
    return (half, rest) if half >= 16 and width < whole and half + rest < whole else (whole, 0)


def target_of(x: Tensor) -> str:
    """What the kernels on this tensor are compiled for: "cuda:80", "hip:gfx942", or "cpu" under the interpreter."""
    if x.device.type == "cpu":
        return "cpu"
    target = triton.runtime.driver.active.get_current_target()
    return f"{target.backend}:{target.arch}"


def last_dense(x: Tensor) -> Tensor:
    """x with its last axis contiguous, which every kernel assumes; any other stride is passed."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def positive_scale(scale: float | None, width: int) -> float:
    """The softmax scale, 1/sqrt(width) by default."""
    scale = width**-0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q (T, HQ, D), k (S, HKV, D), v (S, HKV, Dv) fit together and share a dtype."""
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q, k, v must share bfloat16, float16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}")


@triton.jit
def load_tile(
    base, row, stride, rows, ROWS: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Rows row .. row+ROWS-1, columns FIRST .. FIRST+COLS-1 of a matrix of `rows` x WIDTH; zero outside.

    The row's offset is 64-bit: T * HQ * D passes 2**31 at 128k tokens of 64 heads of 256. MASK = False: all rows exist.
    """
    r, c = tl.arange(0, ROWS), FIRST + tl.arange(0, COLS)
    pointers = base + tl.cast(row, tl.int64) * stride + r[:, None] * stride + c[None, :]
    if FIRST + COLS > WIDTH:
        if MASK:
            return tl.load(pointers, mask=(row + r < rows)[:, None] & (c < WIDTH)[None, :], other=0.0)
        return tl.load(pointers, mask=(c < WIDTH)[None, :], other=0.0)
    if MASK:
        return tl.load(pointers, mask=(row + r < rows)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(
    base, row, stride, rows, x, ROWS: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write x (ROWS, COLS) where `load_tile` would read it."""
    r, c = tl.arange(0, ROWS), FIRST + tl.arange(0, COLS)
    pointers = base + tl.cast(row, tl.int64) * stride + r[:, None] * stride + c[None, :]
    mask = (row + r < rows)[:, None] & (c < WIDTH)[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(rows, there, FIRST: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST .. FIRST+COLS-1 of WIDTH of the rows at these addresses; zero where a row is not there."""
    c = FIRST + tl.arange(0, COLS)
    if FIRST + COLS > WIDTH:
        return tl.load(rows[:, None] + c[None, :], mask=there[:, None] & (c < WIDTH)[None, :], other=0.0)
    return tl.load(rows[:, None] + c[None, :], mask=there[:, None], other=0.0)


@triton.jit
def load_pair(rows, there, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr):
    """These rows as `split_width` cuts them; the second tile is the first again where one does."""
    first = load_rows(rows, there, 0, D1, WIDTH)
    second = first
    if D2 > 0:
        second = load_rows(rows, there, D1, D2, WIDTH)
    return first, second


@triton.jit
def load_tile_pair(
    base, row, stride, rows, ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr,
    MASK: tl.constexpr = True,
):  # fmt: skip
    """`load_pair` of rows row .. row+ROWS-1."""
    first = load_tile(base, row, stride, rows, ROWS, 0, D1, WIDTH, MASK)
    second = first
    if D2 > 0:
        second = load_tile(base, row, stride, rows, ROWS, D1, D2, WIDTH, MASK)
    return first, second


@triton.jit
def store_pair(rows, there, first, second, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr):
    """Write what `load_pair` would read."""
    store_rows(rows, there, first, 0, D1, WIDTH)
    if D2 > 0:
        store_rows(rows, there, second, D1, D2, WIDTH)


@triton.jit
def dot(a, b, acc):
    """acc + a b; exact in float32 (no TF32)."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_pair(a1, a2, b1, b2, ROWS: tl.constexpr, COLS: tl.constexpr, D2: tl.constexpr):
    """a b^T (ROWS, COLS) in float32, of tiles as `load_pair` gives them."""
    s = dot(a1, b1.T, tl.zeros([ROWS, COLS], tl.float32))
    if D2 > 0:
        s = dot(a2, b2.T, s)
    return s


@triton.jit
def store_rows(rows, there, x, FIRST: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Write x where `load_rows` would read it."""
    c = FIRST + tl.arange(0, COLS)
    tl.store(rows[:, None] + c[None, :], x.to(rows.dtype.element_ty), mask=there[:, None] & (c < WIDTH)[None, :])
