"""One layer's attention: projections, rotation, gates, the cache, and the kernel that does the rest."""

import torch
from torch import Tensor, nn

import nsa_kernels
from nsa_kernels.native import CLOSED_GATE
from nsa_models.cache import Cache
from nsa_models.config import NSAConfig
from nsa_models.cost import BRANCHES
from nsa_models.linear import Linear
from nsa_models.rope import Rope, rotate


class MLPCompression(nn.Module):
    """phi as a two-layer perceptron with SiLU, one per key head (paper eq. 7)."""

    def __init__(self, heads: int, block: int, width: int, **factory) -> None:
        super().__init__()
        self.up = _affine(heads, block * width, 2 * width, **factory)
        self.down = _affine(heads, 2 * width, width, **factory)

    def phi(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.up.weight, self.up.bias, self.down.weight, self.down.bias


class LinearCompression(nn.Module):
    """phi as one linear map of the whole block, one per key head."""

    def __init__(self, heads: int, block: int, width: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, block * width, width, **factory))

    def phi(self) -> Tensor:
        return self.weight


class SoftmaxCompression(nn.Module):
    """phi as attention pooling: a mean with softmax weights, then a linear map, one of each per key head."""

    def __init__(self, heads: int, block: int, width: int, **factory) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.empty(heads, width, **factory))
        self.bias = nn.Parameter(torch.empty(heads, block, **factory))
        self.weight = nn.Parameter(torch.empty(heads, width, width, **factory))

    def phi(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.score, self.bias, self.weight


class MeanCompression(nn.Module):
    """phi as the mean: nothing to learn but, if configured, positions."""

    def __init__(self, heads: int, block: int, width: int, **factory) -> None:
        super().__init__()

    def phi(self) -> None:
        return None


def _affine(heads: int, inside: int, outside: int, **factory) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(heads, inside, outside, **factory))
    module.bias = nn.Parameter(torch.empty(heads, outside, **factory))
    return module


KINDS = {
    "mean": MeanCompression,
    "linear": LinearCompression,
    "mlp": MLPCompression,
    "softmax": SoftmaxCompression,
}


def _compression(config: NSAConfig, width: int, keys: bool, **factory) -> nn.Module:
    heads, block = config.num_kv_heads, config.compress_block
    module = KINDS[config.compress_kind](heads, block, width, **factory)
    module.position = None
    if keys and config.compress_positions:
        module.position = nn.Parameter(torch.empty(heads, block, width, **factory))
    return module


def _pairs(x: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """k, v, k, v, ... by branch."""
    return list(zip(x[::2], x[1::2], strict=True))


class Attention(nn.Module):
    """Projections and compression of one layer; `nsa_kernels` does the attention itself."""

    def __init__(self, config: NSAConfig, layer: int, **factory) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        H, HQ, HKV = config.hidden_size, config.num_heads, config.num_kv_heads
        D, Dv, bias = config.head_dim, config.v_head_dim, config.qkv_bias
        self.q_proj = Linear(H, HQ * D, bias, **factory)
        for branch in ("", "_cmp", "_swa") if config.branch_kv else ("",):
            setattr(self, f"k{branch}_proj", Linear(H, HKV * D, bias, **factory))
            setattr(self, f"v{branch}_proj", Linear(H, HKV * Dv, bias, **factory))
        self.inputs = tuple(self.children())  # a tuple registers nothing: names stay fla's
        self.g_proj = Linear(H, 3 * HQ, config.gate_bias, **factory)
        self.o_proj = Linear(HQ * Dv, H, False, **factory)
        self.compress_k = _compression(config, D, True, **factory)
        self.compress_v = _compression(config, Dv, False, **factory)

    def open_branches(self) -> set[str]:
        """Branches that some token's gates can let through; where their weights are zero the biases decide."""
        gate = self.g_proj
        if gate.bias is None or gate.weight.any():
            return set(BRANCHES)
        largest = gate.bias.float().sigmoid().view(-1, 3).amax(0).tolist()
        return {name for name, value in zip(BRANCHES, largest, strict=True) if value > CLOSED_GATE}

    def empty_queries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For `project` to fill: q (T, HQ, D), the compressed branch's queries (q itself unless un-roped), gates."""
        T, HQ, D = x.shape[0], self.config.num_heads, self.config.head_dim
        q = x.new_empty(T, HQ, D)
        return q, torch.empty_like(q) if self.config.compress_rope == "none" else q, x.new_empty(T, HQ, 3)

    def project(
        self, h: Tensor, cos: Tensor, sin: Tensor, cache: Cache, start: int, q: Tensor, q_cmp: Tensor, gates: Tensor
    ) -> None:
        """Queries and gates of (T, H) normed inputs at tokens start .. start+T-1, into q, q_cmp and gates; keys and
        values go to the cache.
        """
        config, T = self.config, h.shape[0]
        plain, *pairs = (linear(h) for linear in self.inputs)
        plain = plain.view_as(q)
        if config.compress_rope == "none":
            q_cmp.copy_(plain)
        rotate(plain, cos, sin, out=q)
        (k, v), *own = _pairs([x.reshape(T, config.num_kv_heads, -1) for x in pairs])
        entries = {"k": rotate(k, cos, sin), "v": v}
        if config.branch_kv:
            (source, v_src), (k_swa, v_swa) = own
            entries["k_src"] = rotate(source, cos, sin) if config.compress_rope == "before" else source
            entries |= {"v_src": v_src, "k_swa": rotate(k_swa, cos, sin), "v_swa": v_swa}
        cache.write(self.layer, start, **entries)
        torch.sigmoid(self.g_proj(h).view_as(gates), out=gates)

    def compress(self, rope: Rope, cache: Cache, stop: int, dtype: torch.dtype) -> None:
        """Fill the compressed blocks that tokens cache.length .. stop-1 complete, from the cached keys themselves:
        the result does not depend on how the context was cut into chunks.
        """
        v = self.config.variant
        first, last = v.compressed_count(cache.length), v.compressed_count(stop)
        if first == last:
            return
        start, end = first * v.compress_stride, (last - 1) * v.compress_stride + v.compress_block
        names = ("k_src", "v_src") if self.config.branch_kv else ("k", "v")
        k, values = (cache.read(self.layer, name, start, end).to(dtype) for name in names)
        place = self.config.compress_rope
        if place != "before" and not self.config.branch_kv:
            k = rope.undo(k, *rope.angles(cache.positions(start, end).to(k.device), dtype))
        k_cmp = nsa_kernels.compress(k, v, self.compress_k.phi(), self.compress_k.position)
        if place == "after":  # a compressed key stands at the first token of its block
            blocks = cache.positions(start, last * v.compress_stride)[:: v.compress_stride].to(k.device)
            k_cmp = rotate(k_cmp, *rope.angles(blocks, dtype))
        v_cmp = nsa_kernels.compress(values, v, self.compress_v.phi())
        cache.write(self.layer, first, k_cmp=k_cmp, v_cmp=v_cmp)

    def attend(self, q: Tensor, q_cmp: Tensor, gates: Tensor, cache: Cache) -> Tensor:
        """T queries after cache.length tokens, whose keys are in the cache already: o (T, HQ, Dv)."""
        stop = cache.length + q.shape[0]
        blocks = self.config.variant.compressed_count(stop)
        own = {}
        if self.config.branch_kv:
            own = {name: cache.read(self.layer, name, 0, stop) for name in ("k_swa", "v_swa")}
        o, _ = nsa_kernels.nsa_attention(
            q,
            cache.read(self.layer, "k", 0, stop),
            cache.read(self.layer, "v", 0, stop),
            cache.read(self.layer, "k_cmp", 0, blocks),
            cache.read(self.layer, "v_cmp", 0, blocks),
            gates,
            self.config.variant,
            offset=cache.length,
            q_cmp=q_cmp,
            **own,
        )
        return o
