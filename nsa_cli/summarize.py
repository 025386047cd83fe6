"""A context -> its summary; what is longer than the model reads is summarized in parts, and then their summaries."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

from nsa_cli.answer import Answer, Request, Timings, Usage, answer, document_room, silent
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.output import say, warn
from nsa_models.errors import BudgetError

if TYPE_CHECKING:
    from nsa_cli.context import Context

WHOLE = "Summarize the text above."
JOIN = "The texts above summarize consecutive parts of one document. Write one summary of the whole document."
FOCUS = " Concentrate on this: "
LABEL = 32  # tokens that name a part in the text of all summaries, at most


def summarize(
    checkpoint: Checkpoint,
    context: "Context",
    focus: str | None,
    request: Request,
    tell: Callable[[str], None],
    instruction: str = WHOLE,
    join: str = JOIN,
) -> Answer:
    """Summarize in one pass where that fits, else part by part and then the parts' summaries, as often as needed.
    instruction: what is asked about a text or a part of it. join: what is asked about the replies to that.

    tell: gets the last pass's text as it comes. Interrupted before that pass, nothing is worth keeping: it raises
    KeyboardInterrupt. BudgetError if the parts' summaries cannot be much shorter than the parts.
    """
    question = instruction + (FOCUS + focus if focus else "")
    room = document_room(checkpoint, question, request)
    if len(context.ids) <= room:
        return answer(checkpoint, context, question, request, tell)
    longest = request.sampling.max_tokens
    if room < 2 * (longest + LABEL):
        raise BudgetError(
            f"{len(context.ids):,} tokens, {room:,} fit at a time, and a summary may take {longest:,}: that shortens "
            f"too little; lower --max-tokens to {max(room // 2 - LABEL, 1):,} or raise --max-context"
        )
    shards = context.split(room)
    say(f"nsa: {len(context.ids):,} tokens, {room:,} fit: summarizing {len(shards)} parts, then their summaries")
    parts = [_part(checkpoint, shard, question, request, i, len(shards)) for i, shard in enumerate(shards, 1)]
    joined = _join(checkpoint, parts)
    if len(joined.ids) >= len(context.ids):
        raise BudgetError(f"{len(shards)} parts' summaries are no shorter than the text; lower --max-tokens")
    later = replace(request, use_store=False, evidence=0)  # summaries are asked about once, and are no place to look
    whole = summarize(checkpoint, joined, focus, later, tell, join, join)
    return _combined(parts, whole, request.evidence)


def _part(checkpoint, shard: "Context", question: str, request: Request, number: int, of: int) -> Answer:
    say(f"nsa: part {number} of {of}, {len(shard.ids):,} tokens")
    part = answer(checkpoint, shard, question, request, silent)
    if part.finish_reason == "interrupted":
        raise KeyboardInterrupt
    if part.finish_reason == "length":
        warn(f"the summary of part {number} was cut at {part.usage.completion_tokens:,} tokens")
    return part


def _join(checkpoint: Checkpoint, parts: Sequence[Answer]) -> "Context":
    from nsa_cli.context import build_context
    from nsa_cli.documents import Document

    documents = [Document(f"part {i:0{len(str(len(parts)))}}", part.text) for i, part in enumerate(parts, 1)]
    return build_context(documents, checkpoint.tokenizer)


def _combined(parts: Sequence[Answer], whole: Answer, limit: int) -> Answer:
    """The last answer, with the evidence of the first reading and what everything together cost."""
    every = [*parts, whole]
    evidence = sorted((e for part in parts for e in part.evidence), key=lambda e: -e.lift)
    return replace(
        whole,
        evidence=evidence[:limit],
        usage=Usage(*map(sum, zip(*(astuple(a.usage) for a in every), strict=True))),
        timings=Timings(*map(sum, zip(*(astuple(a.timings) for a in every), strict=True))),
        shards=len(parts),
    )
