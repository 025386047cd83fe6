"""What a context costs before anything is allocated: bytes and operations, by arithmetic alone. Imports no torch."""

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


def attended_tokens(config: NSAConfig, position: int) -> int:
    """Keys that one query at `position` reads per KV head: compressed + selected + window (paper table 4)."""
    v = config.variant
    seen = position + 1
    return v.compressed_count(seen) + min(seen, v.select_count * v.select_block) + min(seen, v.window)


def attention_operations(config: NSAConfig, tokens: int) -> int:
    """Multiply-adds times two of NSA's products over a prefill of `tokens` tokens, all layers and heads."""
    total = sum(attended_tokens(config, t) for t in range(0, tokens, 64)) * 64
    per_key = 2 * config.num_heads * (config.head_dim + config.v_head_dim)
    return config.num_hidden_layers * per_key * total


def dense_operations(config: NSAConfig, tokens: int) -> int:
    """The same for causal full attention."""
    per_key = 2 * config.num_heads * (config.head_dim + config.v_head_dim)
    return config.num_hidden_layers * per_key * tokens * (tokens + 1) // 2
