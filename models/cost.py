"""What a context costs before anything is allocated: bytes and operations, by arithmetic alone. Imports no torch."""

from collections.abc import Sequence

from nsa_models.config import NSAConfig

# Python, torch and the tokenizer take 0.35 GB before a weight is read; a prefill chunk's activations some 0.25 GB.
PROCESS_BYTES = 600_000_000


def round_capacity(config: NSAConfig, tokens: int) -> int:
    """A cache holds whole selection blocks."""
    return config.variant.block_count(tokens) * config.select_block


def cache_bytes(config: NSAConfig, tokens: int, kv_bytes: int = 2, compressed_bytes: int = 4) -> int:
    """Bytes of a cache of `tokens` tokens: K and V in `kv_bytes` each, compressed ones in `compressed_bytes`."""
    tokens = round_capacity(config, tokens)
    width = config.num_kv_heads * (config.head_dim + config.v_head_dim)
    copies = 3 if config.branch_kv else 1
    compressed = config.variant.compressed_count(tokens)
    return config.num_hidden_layers * width * (copies * tokens * kv_bytes + compressed * compressed_bytes)


def parameter_count(config: NSAConfig) -> int:
    """Parameters without biases and compression weights: what weights in memory and a token's products amount to."""
    return linear_parameters(config) + config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def linear_parameters(config: NSAConfig) -> int:
    """Weights of the layers' linear maps, each used once per token (2 operations)."""
    H, HQ, HKV = config.hidden_size, config.num_heads, config.num_kv_heads
    branches = 3 if config.branch_kv else 1
    attention = H * HQ * (config.head_dim + config.v_head_dim + 3)
    attention += branches * H * HKV * (config.head_dim + config.v_head_dim)
    return config.num_hidden_layers * (attention + 3 * H * config.intermediate_size)


def estimate_memory(config: NSAConfig, context_tokens: int, weights_bytes: int) -> int:
    """Peak bytes of answering over `context_tokens`: weights as held in memory, cache, process."""
    return weights_bytes + cache_bytes(config, context_tokens) + PROCESS_BYTES


BRANCHES = ("compressed", "selected", "window")


def attention_operations(config: NSAConfig, tokens: int, branches: Sequence[str] = BRANCHES) -> int:
    """Multiply-adds times two of NSA's products over a prefill of `tokens` tokens, all layers and heads.

    A query reads T/d compressed keys, n l' selected ones and w of its window (paper table 4). branches: those whose
    values are summed; compressed keys are scored in any case, to select.
    """
    v, D, Dv = config.variant, config.head_dim, config.v_head_dim
    seen = range(1, tokens + 1, 64)
    scored = D + (Dv if "compressed" in branches else 0)
    total = scored * sum(v.compressed_count(n) for n in seen)
    for branch, most in (("selected", v.select_count * v.select_block), ("window", v.window)):
        if branch in branches:
            total += (D + Dv) * sum(min(n, most) for n in seen)
    return 2 * 64 * config.num_hidden_layers * config.num_heads * total


def keys_read(config: NSAConfig, tokens: int, branches: Sequence[str] = BRANCHES) -> int:
    """Keys that the last query of `tokens` tokens attends to per key head, at most all: T/d + n l' + w (paper table 4).

    branches: those that count. Compressed keys that are scored only to select are not attended to.
    """
    v = config.variant
    read = dict(compressed=v.compressed_count(tokens), selected=v.select_count * v.select_block, window=v.window)
    return min(sum(read[branch] for branch in branches), tokens)


def dense_operations(config: NSAConfig, tokens: int) -> int:
    """The same for causal full attention."""
    per_key = 2 * config.num_heads * (config.head_dim + config.v_head_dim)
    return config.num_hidden_layers * per_key * tokens * (tokens + 1) // 2
