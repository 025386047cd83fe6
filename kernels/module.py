"""`NativeSparseAttention`: NSA as a layer for models that people train themselves."""

import torch
from torch import Tensor, nn

from nsa_kernels.dispatch import compress, nsa_attention
from nsa_kernels.packing import Packing
from nsa_kernels.reference import Phi
from nsa_kernels.variant import Variant


class NativeSparseAttention(nn.Module):
    """Causal self-attention over three branches: compressed, selected, window (arXiv 2502.11089, eq. 5-12).

    It takes the place of a causal attention layer: (B, T, dim) in, (B, T, dim) out, positions included. The defaults
    are the paper's: each branch has its own keys and values, compression is learned and knows positions, gates are
    sigmoids. The tensors decide what runs: Triton on a GPU, plain PyTorch elsewhere; both have gradients.

        import torch
        from nsa_kernels import NativeSparseAttention, Variant

        torch.manual_seed(0)
        small = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=4, window=16)
        attention = NativeSparseAttention(dim=32, num_heads=4, num_kv_heads=2, variant=small)
        optimizer = torch.optim.Adam(attention.parameters(), lr=1e-2)
        losses = []
        for step in range(150):
            x, place, name = torch.randn(8, 96, 32), torch.randint(80, (8,)), torch.randint(8, (8,))
            x[range(8), place, name] += 8  # one token of each sequence carries one of eight names
            x[range(8), place, 8] += 8
            x[:, 80:, 9] += 8  # and the last 16 are asked for it
            logits = attention(x)[:, 80:, :8]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), name.repeat_interleave(16))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    dim: width of the input. num_heads: query heads, in groups that share one of num_kv_heads key heads (None = one
    each). head_dim: of queries and keys, None = dim / num_heads; v_head_dim: of values, None = head_dim. compression:
    "mlp" | "linear" | "softmax" (a mean with learned weights, then a linear map) | "mean". positions: learned positions
    within a block, added to the keys before compression. branch_kv: each branch has its own keys and values.
    rope_theta: base of the rotary positions, None = no rotation. compress_rope: "before" = rotated keys are compressed,
    "after" = a compressed key is rotated to its block's first token, "none" = the compressed branch knows no positions.
    Parameter names are those of our checkpoints' layers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        *,
        variant: Variant | None = None,
        compression: str = "mlp",
        positions: bool = True,
        branch_kv: bool = True,
        rope_theta: float | None = 10000.0,
        compress_rope: str = "before",
        qkv_bias: bool = False,
        gate_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        HKV = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % HKV:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({HKV})")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim ({dim}) is no multiple of num_heads ({num_heads}): give head_dim")
        D = dim // num_heads if head_dim is None else head_dim
        Dv = D if v_head_dim is None else v_head_dim
        if rope_theta is not None and D % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {D}")
        if compression not in ("mlp", "linear", "softmax", "mean"):
            raise ValueError(f"compression must be mlp, linear, softmax or mean, got {compression!r}")
        if compress_rope not in ("before", "after", "none"):
            raise ValueError(f"compress_rope must be before, after or none, got {compress_rope!r}")
        self.variant = Variant() if variant is None else variant
        self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim = num_heads, HKV, D, Dv
        self.rope_theta, self.compress_rope, self.branch_kv = rope_theta, compress_rope, branch_kv
        self.q_proj = nn.Linear(dim, num_heads * D, qkv_bias, **factory)
        for branch in ("", "_cmp", "_swa") if branch_kv else ("",):
            setattr(self, f"k{branch}_proj", nn.Linear(dim, HKV * D, qkv_bias, **factory))
            setattr(self, f"v{branch}_proj", nn.Linear(dim, HKV * Dv, qkv_bias, **factory))
        self.g_proj = nn.Linear(dim, 3 * num_heads, gate_bias, **factory)
        self.o_proj = nn.Linear(num_heads * Dv, dim, False, **factory)
        block = self.variant.compress_block
        self.compress_k = _Compression(compression, HKV, block, D, positions, **factory)
        self.compress_v = _Compression(compression, HKV, block, Dv, False, **factory)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x: (B, T, dim), or (T, dim) with sequences packed one after the other, sequence i at rows
        cu_seqlens[i] .. cu_seqlens[i+1]-1. Returns the shape of x. ValueError where cu_seqlens does not ascend from 0
        to T, which is not looked at if it lies on a GPU.
        """
        if x.ndim != (3 if cu_seqlens is None else 2):
            raise ValueError(f"x must be (B, T, dim), or (T, dim) with cu_seqlens; got {tuple(x.shape)}")
        rows = x.flatten(0, -2)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(x.shape[0] + 1, device=x.device, dtype=torch.int32) * x.shape[1]
        elif not cu_seqlens.is_cuda:  # a GPU's is not waited for
            _check_bounds(cu_seqlens, rows.shape[0])
        packing = Packing(cu_seqlens.to(x.device), rows.shape[0], self.variant)
        return self.o_proj(self._attend(*self._project(rows), packing).flatten(1)).view(x.shape)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, gates, then k and v by branch: selected, compressed, window. (T, dim) -> (T, heads, width) each."""

        def heads(projection: nn.Linear, count: int) -> Tensor:
            return projection(x).unflatten(1, (count, -1))

        HQ, HKV = self.num_heads, self.num_kv_heads
        branches = ("", "_cmp", "_swa") if self.branch_kv else ("", "", "")
        projections = [getattr(self, f"{kind}{branch}_proj") for branch in branches for kind in "kv"]
        own = {projection: heads(projection, HKV) for projection in dict.fromkeys(projections)}
        gates = heads(self.g_proj, HQ).sigmoid()
        return heads(self.q_proj, HQ), gates, *(own[projection] for projection in projections)

    def _attend(
        self, q: Tensor, gates: Tensor, k: Tensor, v: Tensor, k_src: Tensor, v_src: Tensor, k_swa: Tensor,
        v_swa: Tensor, packing: Packing,
    ) -> Tensor:  # fmt: skip
        """(T, HQ, Dv)."""
        place, position = self.compress_rope, packing.position
        turned = self._rotate(q, position)
        source = self._rotate(k_src, position) if place == "before" else k_src
        k_cmp = compress(source, self.variant, self.compress_k.phi(), self.compress_k.position, packing)
        if place == "after":
            k_cmp = self._rotate(k_cmp, packing.key_position[: k_cmp.shape[0]])
        v_cmp = compress(v_src, self.variant, self.compress_v.phi(), packing=packing)
        own = dict(k_swa=self._rotate(k_swa, position), v_swa=v_swa) if self.branch_kv else {}
        q_cmp = q if place == "none" else turned
        k = self._rotate(k, position)
        return nsa_attention(turned, k, v, k_cmp, v_cmp, gates, self.variant, q_cmp=q_cmp, packing=packing, **own)[0]

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotate row i of x (T, H, D) to position[i]: half-split pairs, angles in float32 or better."""
        if self.rope_theta is None:
            return x
        compute = torch.promote_types(x.dtype, torch.float32)
        half = torch.arange(x.shape[-1] // 2, device=x.device, dtype=compute) * 2 / x.shape[-1]
        angle = position.to(compute)[:, None, None] * self.rope_theta**-half
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _Compression(nn.Module):
    """phi (eq. 7): the mean of a block, a linear map of it, its mean with softmax weights and a linear map after it, or
    a perceptron with one hidden layer; one per key head.

    The linear map starts as the mean, plus noise that tells the tokens of a block apart; softmax weights as the mean.
    """

    def __init__(self, kind: str, heads: int, block: int, width: int, positions: bool, **factory) -> None:
        super().__init__()
        self.kind, inputs = kind, block * width
        if kind == "linear":
            mean = torch.eye(width, **factory).repeat(block, 1) / block
            noise = torch.randn(heads, inputs, width, **factory) * 0.1 * inputs**-0.5
            self.weight = nn.Parameter(mean + noise)
        elif kind == "softmax":
            self.score = nn.Parameter(torch.zeros(heads, width, **factory))
            self.bias = nn.Parameter(torch.zeros(heads, block, **factory))
            self.weight = nn.Parameter(torch.eye(width, **factory).repeat(heads, 1, 1))
        elif kind == "mlp":
            self.up = _affine(heads, inputs, 2 * width, **factory)
            self.down = _affine(heads, 2 * width, width, **factory)
        self.position = nn.Parameter(torch.randn(heads, block, width, **factory) * 0.02) if positions else None

    def phi(self) -> Phi:
        if self.kind == "mean":
            return None
        if self.kind == "linear":
            return self.weight
        if self.kind == "softmax":
            return self.score, self.bias, self.weight
        return self.up.weight, self.up.bias, self.down.weight, self.down.bias


def _check_bounds(cu_seqlens: Tensor, rows: int) -> None:
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] or bounds[-1] != rows or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must ascend from 0 to {rows}, the rows of x; got {bounds[:1]} .. {bounds[-1:]}")


def _affine(heads: int, inside: int, outside: int, **factory) -> nn.Module:
    """weight (heads, inside, outside), bias (heads, outside): `nn.Linear`'s bounds, one map per head."""
    module, bound = nn.Module(), inside**-0.5
    module.weight = nn.Parameter(torch.empty(heads, inside, outside, **factory).uniform_(-bound, bound))
    module.bias = nn.Parameter(torch.empty(heads, outside, **factory).uniform_(-bound, bound))
    return module
