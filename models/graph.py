"""One decode step with every length on the device: `model.advance` of a token without a word to the host, so that a
CUDA graph can hold it. A step of 30 layers is some 700 launches, and from Python each costs microseconds.
"""

import torch
from torch import Tensor

from nsa_kernels.append import append, compress_newest
from nsa_kernels.decode import decode_attention, decode_dense
from nsa_models.attention import Attention
from nsa_models.cache import Cache
from nsa_models.positions import chunk_of, positions
from nsa_models.rope import Rope
from nsa_models.transformer import NSAModel


def supports(model: NSAModel, cache: Cache) -> bool:
    """Whether the kernels take this cache: they multiply queries and keys of one type, and a table tells them where a
    token stood when it came; a block over the end of a chunk of positions has tokens that were turned since.
    """
    stays = not model.config.position_chunk or model.config.compress_rope == "before"
    return cache.dtype == cache.compressed_dtype == model.dtype != torch.float64 and stays


class DeviceStep:
    """The next token's logits, from and into buffers that stay where they are.

    `token` (1,) int64 and `length` (1,) int32, tokens in the cache before the step, are set by the caller; `run` adds
    one to `length`. A length of -1 reads and writes nothing of the cache.
    """

    def __init__(self, model: NSAModel, cache: Cache, dense: bool = False) -> None:
        self.model, self.cache, self.dense = model, cache, dense
        self.token = torch.zeros(1, dtype=torch.long, device=model.device)
        self.length = torch.zeros(1, dtype=torch.int32, device=model.device)
        token = torch.arange(cache.capacity, device=model.device)
        where = positions(model.config, token, chunk_of(model.config, token))
        angles = Rope(model.config, cache.rope_factor).angles(where, model.dtype)
        self.angles = tuple(x.flatten(1).contiguous() for x in angles)  # (capacity, D/2)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Enter `token` into the cache. Returns (vocab,) in float32."""
        self.length += 1
        x = self.model.model.embeddings(self.token, self.model.dtype)
        for layer in self.model.model.layers:
            x = x + layer.attn.o_proj(self._attention(layer.attn, layer.attn_norm(x)))
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.model.logits(self.model.model.norm(x))[0]

    def _attention(self, attn: Attention, h: Tensor) -> Tensor:
        """h: (1, H) normed. Returns (1, HQ * Dv)."""
        config, variant, length = attn.config, attn.config.variant, self.length
        HQ, HKV, place = config.num_heads, config.num_kv_heads, config.compress_rope

        def cached(name: str) -> Tensor:
            return self.cache.buffers[f"layers.{attn.layer}.{name}"][None]  # a batch of one sequence

        plain, k, v, *own = (linear(h) for linear in attn.inputs)
        plain = plain.view(1, HQ, -1)
        k, v, *own = (x.view(1, HKV, -1) for x in (k, v, *own))
        q = append(plain, k, v, cached("k"), cached("v"), length, *self.angles)
        names = ("k", "v")
        if own:  # their queries are the selected branch's
            names = ("k_src", "v_src")
            append(own[0], *own[:2], *map(cached, names), length, *(self.angles if place == "before" else ()))
            append(own[2], *own[2:], cached("k_swa"), cached("v_swa"), length, *self.angles)
        undo = self.angles if place != "before" and not own else None
        keys, values = attn.compress_k, attn.compress_v
        compress_newest(
            cached(names[0]), cached("k_cmp"), length, variant, keys.phi(), keys.position,
            undo=undo, rotate=self.angles if place == "after" else None,
        )  # fmt: skip
        compress_newest(cached(names[1]), cached("v_cmp"), length, variant, values.phi())
        if self.dense:
            return decode_dense(q, cached("k"), cached("v"), length).flatten(1)
        gates = torch.sigmoid(attn.g_proj(h)).view(1, HQ, 3)
        windows = dict(k_swa=cached("k_swa"), v_swa=cached("v_swa")) if own else {}
        o, _ = decode_attention(
            q, *map(cached, ("k", "v", "k_cmp", "v_cmp")), gates, length, variant,
            q_cmp=plain if place == "none" else q, **windows,
        )  # fmt: skip
        return o.flatten(1)


class CapturedStep:
    """A `DeviceStep` in a CUDA graph. The logits of a step are overwritten by the next."""

    def __init__(self, model: NSAModel, cache: Cache, dense: bool = False) -> None:
        self.step = DeviceStep(model, cache, dense)
        with torch.cuda.device(model.device):  # Triton launches on the current GPU
            self._capture(model)

    def _capture(self, model: NSAModel) -> None:
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries set up outside the capture, on no token
                self.step.length.fill_(-1)
                self.step.run()
        torch.cuda.current_stream(model.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step.run()

    def run(self, token: int, length: int) -> Tensor:
        """Enter `token` after `length` tokens. Returns (vocab,) in float32."""
        with torch.cuda.device(self.step.model.device):
            self.step.token.fill_(token)
            self.step.length.fill_(length)
            self.graph.replay()
        return self.logits
