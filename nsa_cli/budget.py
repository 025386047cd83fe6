"""Whether a question with its document fits the model, --max-context and memory, and how much of it would."""

from bisect import bisect_right
from typing import TYPE_CHECKING

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.request import Request
from nsa_models.errors import BudgetError

if TYPE_CHECKING:
    from nsa_cli.context import Context

FIT_SHARE = 0.9  # of free memory: what is free changes until it is taken


def most_tokens(checkpoint: Checkpoint, request: Request) -> int:
    """Of document, question and answer: what the model was made for, --max-context and, with --fit, memory allow."""
    limit = min(checkpoint.config.max_position_embeddings, request.max_context or 1 << 62)
    if not request.fit:
        return limit
    free, weights = free_memory(checkpoint, request)
    return min(limit, fitting(checkpoint, FIT_SHARE * free, weights, limit))


def document_room(checkpoint: Checkpoint, question: str, request: Request) -> int:
    """Document tokens that fit beside the question and the answer."""
    limit = most_tokens(checkpoint, request)
    prompt = checkpoint.tokenizer.prompt(request.wording(question), request.system)
    around = sum(map(len, prompt)) + request.sampling.max_tokens
    if around >= limit:
        raise BudgetError(
            f"the question and up to {request.sampling.max_tokens:,} answer tokens take {around:,} tokens; "
            f"the context holds {limit:,}: lower --max-tokens or ask a shorter question"
        )
    return limit - around


def check_fit(checkpoint: Checkpoint, context: "Context", question: str, request: Request, capacity: int) -> None:
    """Refuse, before anything is allocated, what fits neither the model nor memory."""
    from nsa_cli.context import check_budget
    from nsa_models.cost import estimate_memory

    check_budget(len(context.ids), document_room(checkpoint, question, request), context.files)
    free, weights = free_memory(checkpoint, request)
    needed = estimate_memory(checkpoint.config, capacity, weights)
    if needed > free:
        raise BudgetError(
            f"{capacity:,} tokens need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; about "
            f"{fitting(checkpoint, free, weights, capacity):,} tokens would fit: --fit --overflow drop, or shard"
        )


def free_memory(checkpoint: Checkpoint, request: Request) -> tuple[int, int]:
    """Bytes that an answer may take, and what of them is for weights that are still to be loaded."""
    held = request.held.nbytes if request.held else 0
    return checkpoint.free_memory() + held, 0 if checkpoint.loaded else checkpoint.weights_bytes()


def fitting(checkpoint: Checkpoint, free: float, weights: int, most: int) -> int:
    """How many tokens, `most` at most, `free` bytes hold beside the weights."""
    from nsa_models.cost import estimate_memory

    fits = bisect_right(range(most), free, key=lambda tokens: estimate_memory(checkpoint.config, tokens, weights))
    return max(fits - 1, 0)
