"""Is a checkpoint usable? Every promise that can be tested on any machine in a few seconds."""

from collections.abc import Iterator
from pathlib import Path

import torch

from nsa_models.cache import Cache
from nsa_models.checkpoint import load_model
from nsa_models.engine import prefill
from nsa_models.errors import ModelError
from nsa_models.tokenizer import load_tokenizer

PROBE = "The quick brown fox jumps over the lazy dog. <|im_end|> naïve 漢字 🦊\n\tdef f(x): return x ** 2\n"


def check(directory: Path) -> Iterator[str]:
    """Yield one line per passed check; raise ModelError at the first that fails."""
    model = load_model(directory)
    yield f"{sum(p.numel() for p in model.parameters()):,} parameters, every name and shape as config.json says"
    scales = {
        f"{n}.weight_scale": s for n, m in model.named_modules() if (s := getattr(m, "weight_scale", None)) is not None
    }
    stored = dict(model.named_parameters()) | scales
    bad = [name for name, p in stored.items() if p.is_floating_point() and not p.isfinite().all()]
    if bad:
        raise ModelError(f"{directory}: {bad[0]} holds values that are not finite ({len(bad)} tensors do)")
    yield "every weight is finite"
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(PROBE)
    if tokenizer.decode(ids) != PROBE:
        raise ModelError(f"{directory}: the tokenizer does not give back the text it encodes")
    yield f"tokenizer: {tokenizer.vocab_size:,} tokens, lossless, control tokens in text stay text"
    prompt = tokenizer.prompt("What is this?")
    yield "chat template renders" if tokenizer.has_chat_template else "no chat template: a plain layout is used"
    ids = torch.tensor(prompt.before + ids * 3 + prompt.after)[-model.config.max_position_embeddings :]
    whole = model(ids)[-1]
    pieces = prefill(model, ids, Cache(model.config, len(ids), model.device, model.dtype), chunk=17)
    error = ((whole - pieces).norm() / whole.norm()).item()
    # A few rows times int8 weights are multiplied in bfloat16 on every CPU (`linear.int8_linear`), more in model.dtype:
    # the built-in model's logits differed by 2.9e-3 where it computes in float32.
    limit = 2e-2 if model.dtype == torch.bfloat16 or scales else 1e-4
    if not whole.isfinite().all() or not error < limit:
        raise ModelError(f"{directory}: chunked prefill differs from whole prefill by {error:.1e}, over {limit:.0e}")
    yield f"computes in {str(model.dtype).removeprefix('torch.')}: chunked = whole prefill within {error:.1e}"
