"""`NSAConfig`: one frozen dataclass that describes every NSA model this project can run. Imports no torch."""

import difflib
import math
from dataclasses import asdict, dataclass, field, fields

from nsa_kernels.variant import Variant
from nsa_models.errors import ModelError

MOST_LAYERS = 1000
KINDS_OF_SCALING = ("yarn", "dynamic_yarn", "dual_chunk", "llama3", "linear")
POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "num_kv_heads", "head_dim", "v_head_dim"),
    *("intermediate_size", "max_position_embeddings", "rope_theta", "norm_eps"),
)
HEADS = ("retrieval_heads", "reread_heads")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for contexts beyond the trained length.

    `yarn` (arXiv 2309.00071), `llama3` and `linear` always apply. `dynamic_yarn` is YaRN with the smallest power of
    two that covers the context, at most `factor`: a context within the trained length runs unscaled, as the base does.
    `dual_chunk` leaves frequencies alone and bounds distances (`positions.py`).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # YaRN multiplies rotated queries and keys by 0.1 * mscale * ln(factor) + 1
    kind: str = "dynamic_yarn"
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    chunk: int = 0  # dual_chunk: tokens; distances are true within a chunk and to the one before it

    def __post_init__(self) -> None:
        _check_types(self, "rope_scaling ")
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            raise ModelError("config: rope_scaling needs a factor and original_max_position_embeddings of at least 1")
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ModelError("config: rope_scaling beta_slow must be above 0, and beta_fast not below it")
        if self.mscale < 0:
            raise ModelError("config: rope_scaling mscale must not be negative")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ModelError("config: rope_scaling low_freq_factor must be below high_freq_factor")
        if self.kind not in KINDS_OF_SCALING:
            raise ModelError(
                f"config: rope_scaling kind must be one of {', '.join(KINDS_OF_SCALING)}, got {self.kind!r}"
            )
        if (self.chunk > 0) != (self.kind == "dual_chunk") or self.chunk < 0:
            raise ModelError(f"config: rope_scaling chunk is for dual_chunk, which needs it, got {self.chunk}")


@dataclass(frozen=True)
class NSAConfig:
    """Shape and attention variant of a checkpoint; the field names are those of our `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int  # query heads, HQ
    num_kv_heads: int  # HKV; G = HQ / HKV query heads share one key head
    head_dim: int  # of q and k
    intermediate_size: int
    v_head_dim: int = 0  # of v; 0 = head_dim
    max_position_embeddings: int = 8192  # the longest context the checkpoint is meant for
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    gate_bias: bool = False  # g_proj has a bias (converted models start from it)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    # Attention variant: the geometry is a Variant's, the rest says what is compressed and how.
    compress_kind: str = "mean"  # mean | linear | mlp | softmax
    compress_positions: bool = False  # learned intra-block positions added to the keys before compression
    compress_rope: str = "before"  # before: roped keys are pooled | after: un-roped, then roped at i*d | none
    branch_kv: bool = False  # separate K/V projections per branch, as in the paper
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_count: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2
    window: int = 512
    importance_map: str = "geometric"
    topk: str = "exact"
    topk_chunk: int = 0

    retrieval_heads: tuple[tuple[int, int], ...] = ()  # (layer, query head) that evidence comes from; none = all
    retrieval_block: int = 0  # tokens of a place that evidence names; 0 = select_block
    reread: int = 0  # tokens of the passages that a question leads to and that answer it; 0 = the whole text does
    reread_heads: tuple[tuple[int, int], ...] = ()  # those that rank the passages as they read them; none = no others

    variant: Variant = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if not self.v_head_dim:
            set_(self, "v_head_dim", self.head_dim)
        if isinstance(self.rope_scaling, dict):
            try:
                set_(self, "rope_scaling", RopeScaling(**self.rope_scaling))
            except TypeError as error:
                raise ModelError(f"config: rope_scaling: {error}") from None
        ends = self.eos_token_ids
        if not isinstance(ends, (list, tuple)) or not all(_is(int, i) and i >= 0 for i in ends):
            raise ModelError(f"config: eos_token_ids must be a list of token ids, got {ends!r}")
        set_(self, "eos_token_ids", tuple(ends))
        for name in HEADS:
            set_(self, name, self._heads(name))
        _check_types(self)
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ModelError(f"config: {name} must be positive, got {getattr(self, name)!r}")
        for name in ("retrieval_block", "reread"):
            if getattr(self, name) < 0:
                raise ModelError(f"config: {name} must be at least 0, got {getattr(self, name)}")
        if self.num_hidden_layers > MOST_LAYERS:
            raise ModelError(f"config: {self.num_hidden_layers} layers are more than the {MOST_LAYERS} that nsa runs")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config: num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2 or self.head_dim > 256:
            raise ModelError(f"config: head_dim must be even and at most 256, got {self.head_dim}")
        choices = {
            "compress_kind": ("mean", "linear", "mlp", "softmax"),
            "compress_rope": ("before", "after", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ModelError(f"config: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        try:
            set_(self, "variant", Variant(**{f.name: getattr(self, f.name) for f in fields(Variant)}))
        except ValueError as error:
            raise ModelError(f"config: {error}") from None
        if self.position_chunk % self.select_block or 0 < self.position_chunk < max(self.window, self.compress_block):
            raise ModelError(
                f"config: rope_scaling chunk ({self.position_chunk}) must be a multiple of select_block "
                f"({self.select_block}), and no shorter than window and compress_block"
            )
        learned = self.compress_kind != "mean" or self.compress_positions
        if self.position_chunk and self.compress_rope == "before" and learned:
            raise ModelError(
                "config: rope_scaling dual_chunk turns compressed keys, which only means of rotated keys can be; "
                "learned compression needs compress_rope after or none"
            )

    def _heads(self, name: str) -> tuple[tuple[int, int], ...]:
        """The key's heads as pairs that exist."""
        heads, limits = getattr(self, name), (self.num_hidden_layers, self.num_heads)
        pairs = heads if isinstance(heads, (list, tuple)) else [heads]
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_below, pair, limits)):
                raise ModelError(
                    f"config: {name} must be a list of [layer, query head], below {list(limits)}: {pair!r}"
                )
        return tuple(map(tuple, pairs))

    @property
    def evidence_block(self) -> int:
        """Tokens of a place that evidence names."""
        return self.retrieval_block or self.select_block

    @property
    def position_chunk(self) -> int:
        """Tokens of a chunk where positions are those of dual chunks, else 0."""
        return self.rope_scaling.chunk if self.rope_scaling else 0

    def rope_factor(self, tokens: int) -> float:
        """The factor for a context of up to `tokens` tokens, fixed for the whole of it (rotated keys are cached)."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "dual_chunk":
            return 1.0
        if scaling.kind != "dynamic_yarn":
            return scaling.factor
        if tokens <= scaling.original_max_position_embeddings:
            return 1.0
        ratio = -(-tokens // scaling.original_max_position_embeddings)
        return float(min(scaling.factor, 1 << (ratio - 1).bit_length()))

    def to_dict(self) -> dict:
        """The `config.json` keys of this config (without `model_type` and the format version)."""
        values = asdict(self)
        del values["variant"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "NSAConfig":
        """Read our own keys; an unknown key is an error that names the nearest known one."""
        known = {f.name for f in fields(cls) if f.init}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ModelError(f"config: unknown key {key!r}{hint}")
        missing = [f.name for f in fields(cls) if f.init and f.name not in values and _required(f)]
        if missing:
            raise ModelError(f"config: missing {', '.join(missing)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"config: {error}") from None


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", RopeScaling: "an object"}


def _check_types(values: NSAConfig | RopeScaling, where: str = "") -> None:
    """Whole numbers are numbers too; nothing else passes for another type, and no number is infinite."""
    for f in fields(values):
        value = getattr(values, f.name, None)
        kinds = getattr(f.type, "__args__", (f.type,))  # of a union
        if f.name in ("variant", "eos_token_ids", *HEADS) or (value is None and type(None) in kinds):
            continue
        if not _is(kinds[0], value):
            raise ModelError(f"config: {where}{f.name} must be {_KINDS[kinds[0]]}, got {value!r}")


def _is(kind: type, value: object) -> bool:
    if kind is float:
        return _is(int, value) or (isinstance(value, float) and math.isfinite(value))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62
    return isinstance(value, kind)


def _below(value: object, limit: object) -> bool:
    return _is(int, value) and _is(int, limit) and 0 <= value < limit


def _required(f) -> bool:
    from dataclasses import MISSING

    return f.default is MISSING and f.default_factory is MISSING
