"""A context -> its summary; what is longer than the model reads is summarized in parts, and then their summaries."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nsa_cli.answer import answer, answers
from nsa_cli.budget import document_room
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.citations import check_citations
from nsa_cli.output import say, silent, warn
from nsa_cli.reply import Answer, combined
from nsa_cli.request import Request
from nsa_models.errors import BudgetError

if TYPE_CHECKING:
    from nsa_cli.context import Context

WHOLE = "Summarize the text above"
JOIN = "The texts above summarize consecutive parts of one document. Summarize the whole document"
JOIN_ANSWERS = "The texts above answer a question from consecutive parts of one document. Answer it from them all: "
LENGTHS = {"short": "in one or two sentences", "medium": "in one paragraph", "long": "in several paragraphs"}
STYLES = {
    "bullets": "as a list of bullet points",
    "plain": "in simple words that anyone understands",
    "headline": "as a headline and one sentence below it",
    "abstract": "as the abstract of a scientific paper",
}
TOKENS_A_WORD = 2  # at most, but for rare words
LABEL = 32  # tokens that name a part in the text of all summaries, at most


@dataclass(frozen=True)
class Wish:
    """How a summary should be. length: one of LENGTHS or a number of words; style: one of STYLES."""

    focus: str | None = None
    length: str | int | None = None
    style: str | None = None

    def wording(self, instruction: str) -> str:
        length = LENGTHS.get(self.length, f"in about {self.length} words") if self.length else None
        ways = ", ".join(filter(None, (length, STYLES.get(self.style))))
        focus = f" Concentrate on this: {self.focus}" if self.focus else ""
        return f"{instruction}{' ' * bool(ways)}{ways}.{focus}"

    def max_tokens(self) -> int:
        """What a summary of this many words may take; 0 where no number is wished for."""
        return self.length * TOKENS_A_WORD if isinstance(self.length, int) else 0


def summarize(
    checkpoint: Checkpoint,
    context: "Context",
    request: Request,
    tell: Callable[[str], None],
    instruction: str,
    join: str,
) -> Answer:
    """Summarize in one pass where that fits, else part by part and then the parts' summaries, as often as needed.
    instruction: what is asked about a text or a part of it. join: what is asked about the replies to that.

    tell: gets the last pass's text as it comes. Interrupted before that pass, nothing is worth keeping: it raises
    KeyboardInterrupt. BudgetError if the parts' summaries cannot be much shorter than the parts.
    """
    room = document_room(checkpoint, instruction, request)
    if len(context.ids) <= room:
        return answer(checkpoint, context, instruction, request, tell)
    longest = request.sampling.max_tokens
    if room < 2 * (longest + LABEL):
        raise BudgetError(
            f"{len(context.ids):,} tokens, {room:,} fit at a time, and a summary may take {longest:,}: that shortens "
            f"too little; lower --max-tokens to {max(room // 2 - LABEL, 1):,} or raise --max-context"
        )
    shards = context.split(room)
    say(f"nsa: {len(context.ids):,} tokens, {room:,} fit: reading {len(shards)} parts, then what was said of them")
    parts = [_part(checkpoint, shard, instruction, request, i, len(shards)) for i, shard in enumerate(shards, 1)]
    joined = _join(checkpoint, parts)
    if len(joined.ids) >= len(context.ids):
        raise BudgetError(f"{len(shards)} parts' summaries are no shorter than the text; lower --max-tokens")
    later = replace(request, store="off", evidence=0)  # summaries are asked about once, and are no place to look
    whole = summarize(checkpoint, joined, later, tell, join, join)
    whole = combined(parts, whole, request.evidence)
    return replace(whole, shards=len(parts), citations=check_citations(whole.text, context))


def ask_about(
    checkpoint: Checkpoint,
    context: "Context",
    questions: Sequence[str],
    request: Request,
    room: int,
    tell: Callable[[str], None],
) -> Iterator[Answer]:
    """Answers from one reading, where the context's tokens are at most `room`; else each question is asked about every
    part, and the answers are put together.
    """
    if context.tokens <= room:
        yield from answers(checkpoint, context, questions, request, tell)
        return
    for question in questions:
        yield summarize(checkpoint, context, request, tell, question, JOIN_ANSWERS + question)


def _part(checkpoint, shard: "Context", question: str, request: Request, number: int, of: int) -> Answer:
    say(f"nsa: part {number} of {of}, {len(shard.ids):,} tokens")
    part = answer(checkpoint, shard, question, request, silent)
    if part.finish_reason == "interrupted":
        raise KeyboardInterrupt
    if part.finish_reason == "length":
        warn(f"what was said of part {number} was cut at {part.usage.completion_tokens:,} tokens")
    return part


def _join(checkpoint: Checkpoint, parts: Sequence[Answer]) -> "Context":
    from nsa_cli.context import build_context
    from nsa_cli.documents import Document

    documents = [Document(f"part {i:0{len(str(len(parts)))}}", part.text) for i, part in enumerate(parts, 1)]
    return build_context(documents, checkpoint.tokenizer)
