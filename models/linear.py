"""A linear map whose weight is kept as float, or as int8 with one scale per output channel."""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Rows up to which int8 weights are used as they are: reading them bounds the time (134 MB a token instead of 538
# for the built-in model). More rows are bound by the products, which run on the expanded weight.
# torch's kernel takes four rows at a time with loads that need weights at a multiple of 16 bytes, and mapped ones lie
# where the file has them (the built-in model's at 4 beyond): four rows ended the process. One to three load otherwise.
# So do the outputs: the last ones of a weight whose outputs are no multiple of four ended it too.
FEW_ROWS = 3
OUTPUTS = 4


class Linear(nn.Module):
    """y = x W^T + b. `weight`: (out, in) float, or int8 with `weight_scale` (out,)."""

    def __init__(self, inside: int, outside: int, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outside, inside, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outside, device=device, dtype=dtype)) if bias else None
        self.weight_scale: Tensor | None = None  # set when the checkpoint stores int8
        self._expanded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, in) -> (T, out)."""
        if self.weight_scale is None:
            return functional.linear(x, self.weight, self.bias)
        if is_few(x):
            return int8_linear(x, self.weight, self.weight_scale, self.bias)
        return functional.linear(x, self.expanded(x.dtype), self.bias)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The float weight of an int8 one, made once."""
        if self._expanded is None or self._expanded.dtype != dtype:
            self._expanded = (self.weight.float() * self.weight_scale[:, None]).to(dtype)
        return self._expanded


def is_few(x: Tensor) -> bool:
    """Whether int8 weights are used as they are. torch's kernel reads beyond rows that are no multiple of 16."""
    return x.shape[0] <= FEW_ROWS and x.shape[1] % 16 == 0 and x.device.type == "cpu" and x.dtype != torch.float64


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A few rows times int8 weights, x in bfloat16: torch's float32 kernel read 2 GB/s where this one reads 21."""
    whole = weight.shape[0] // OUTPUTS * OUTPUTS
    y = torch._weight_int8pack_mm(x.bfloat16(), weight[:whole], scale[:whole].bfloat16()).to(x.dtype)
    if whole < weight.shape[0]:
        last = (weight[whole:].float() * scale[whole:, None]).to(x.dtype)
        y = torch.cat([y, functional.linear(x, last)], 1)
    return y if bias is None else y + bias
