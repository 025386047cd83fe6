"""The NSA transformer: RMSNorm, NSA attention, SwiGLU. Parameter names are a superset of fla's `NSAForCausalLM`.

`advance` is the whole model: T new tokens after those in the cache. On a CPU, what is independent per token runs on
slices of rows, one slice a thread: two threads with one-threaded products gave 117-127 GFLOP/s where torch's own two
threads inside each product gave 80-97 (2048 rows, 576 x 1536, float32, AVX2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import nsa_kernels
from nsa_kernels.rows import over_rows
from nsa_models.attention import Attention
from nsa_models.cache import Cache
from nsa_models.comparators import Attention as Attend
from nsa_models.config import NSAConfig
from nsa_models.cost import BRANCHES
from nsa_models.linear import Linear, int8_linear, is_few
from nsa_models.retrieval import RetrievalMass
from nsa_models.rope import Rope


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: NSAConfig, **factory) -> None:
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(H, I, False, **factory)
        self.up_proj = Linear(H, I, False, **factory)
        self.down_proj = Linear(I, H, False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)).mul_(self.up_proj(x)))


class Layer(nn.Module):
    """One pre-norm block; x is updated in place."""

    def __init__(self, config: NSAConfig, index: int, **factory) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
        self.attn = Attention(config, index, **factory)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
        self.mlp = MLP(config, **factory)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        angles: tuple[Tensor, Tensor],
        cache: Cache,
        dense: bool,
        retrieval: RetrievalMass | None,
        attention: Attend | None,
    ) -> None:
        """x: (T, H), updated."""
        attn, T = self.attn, x.shape[0]
        start, (cos, sin) = cache.length, angles
        q, q_cmp, gates = attn.empty_queries(x)

        def project(rows: slice) -> None:
            h = self.attn_norm(x[rows])
            attn.project(h, cos[rows], sin[rows], cache, start + rows.start, q[rows], q_cmp[rows], gates[rows])

        over_rows(project, T, x.device)
        attn.compress(rope, cache, start + T, x.dtype)
        k, v = (cache.read(attn.layer, name, 0, start + T) for name in ("k", "v"))
        if attention is not None:
            o = attention(attn.layer, q, k, v, start)
        else:
            o = nsa_kernels.dense_attention(q, k, v, offset=start) if dense else attn.attend(q, q_cmp, gates, cache)
        if retrieval is not None:
            retrieval.add(attn.layer, q, k, rope, cache.positions(0, start + T))

        def finish(rows: slice) -> None:
            x[rows] += attn.o_proj(o[rows].flatten(1))
            x[rows] += self.mlp(self.mlp_norm(x[rows]))

        over_rows(finish, T, x.device)


class Embedding(nn.Module):
    """Rows of a (vocab, H) table, float or int8 with a scale per row."""

    def __init__(self, config: NSAConfig, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))
        self.weight_scale: Tensor | None = None

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        rows = functional.embedding(ids, self.weight)
        if self.weight_scale is None:
            return rows
        return (rows.float() * self.weight_scale[ids, None]).to(dtype)


class Body(nn.Module):
    """Everything between token ids and the last hidden state; only a namespace for parameter names."""

    def __init__(self, config: NSAConfig, **factory) -> None:
        super().__init__()
        self.embeddings = Embedding(config, **factory)
        self.layers = nn.ModuleList(Layer(config, i, **factory) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, **factory)


class NSAModel(nn.Module):
    """A causal language model with Native Sparse Attention.

    `model(input_ids)` gives the logits of every token; `nsa_models.prefill` and `decode` work on a `Cache`.
    """

    def __init__(self, config: NSAConfig, device=None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = ""  # identity of the weights, set by load_model
        self.model = Body(config, device=device, dtype=dtype)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, device=device, dtype=dtype)
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def open_branches(self) -> list[str]:
        """The branches that a gate of some layer can let through."""
        found = set().union(*(layer.attn.open_branches() for layer in self.model.layers))
        return [branch for branch in BRANCHES if branch in found]

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (T,). Returns logits (T, vocab), computed as one chunk over an exact cache."""
        cache = Cache(self.config, input_ids.shape[0], self.device, self.dtype)
        return self.logits(self.advance(input_ids, cache))

    @torch.no_grad()
    def advance(
        self,
        ids: Tensor,
        cache: Cache,
        dense: bool = False,
        retrieval: RetrievalMass | None = None,
        attention: Attend | None = None,
    ) -> Tensor:
        """Append T tokens to the cache. dense: full attention over the same weights, for comparison; attention: any
        other (`comparators`). retrieval: collects where the tokens look.

        ids: (T,). Returns the last hidden states (T, H), normed.
        """
        cache.require_room(ids.shape[0])
        done = []
        while ids.shape[0]:
            room = cache.turn() or ids.shape[0]
            done.append(self._advance(ids[:room], cache, dense, retrieval, attention))
            ids = ids[room:]
        return self.model.norm(torch.cat(done))

    def _advance(self, ids: Tensor, cache: Cache, dense: bool, retrieval, attention) -> Tensor:
        """Tokens of one chunk of positions. Returns the last hidden states (T, H) before the norm."""
        T = ids.shape[0]
        rope = Rope(self.config, cache.rope_factor)
        angles = rope.angles(cache.positions(cache.length, cache.length + T).to(self.device), self.dtype)
        x = self.model.embeddings(ids.to(self.device), self.dtype)
        for layer in self.model.layers:
            layer(x, rope, angles, cache, dense, retrieval, attention)
        cache.length += T
        return x

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, vocab) in float32 or better."""
        if self.lm_head is not None:
            y = self.lm_head(x)
        else:
            table = self.model.embeddings
            if table.weight_scale is None:
                y = functional.linear(x, table.weight)
            elif is_few(x):
                y = int8_linear(x, table.weight, table.weight_scale)
            else:
                y = functional.linear(x, (table.weight.float() * table.weight_scale[:, None]).to(x.dtype))
        return y if y.dtype == torch.float64 else y.float()


def parameter_shapes(config: NSAConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter name a checkpoint of this config must have, with its shape."""
    return {name: tuple(p.shape) for name, p in NSAModel(config, device="meta").named_parameters()}
