"""Passages to practise rereading on: those that hold an answer, among others that its question could lead to."""

import math
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nsa_cli.context import build_context
from nsa_cli.documents import Document
from nsa_cli.evidence import counted_tokens
from nsa_cli.reread import around, best_last, cut
from nsa_models.training.tasks import Unsuitable

if TYPE_CHECKING:
    from nsa_cli.context import Context, ContextFile
    from nsa_models import NSAConfig
    from nsa_models.tokenizer import Tokenizer
    from nsa_models.training.tasks import Task


def practice_passages(
    rng: random.Random, task: "Task", tokenizer: "Tokenizer", config: "NSAConfig", room: int
) -> "list[ContextFile]":
    """Passages of at most `room` tokens, as `nsa_cli.reread` cuts and orders them: around the task's places, and as
    many as fit around blocks that share tokens with the question, as retrieval heads go by them. Raises Unsuitable
    where they would not hold what the answer takes.
    """
    context = build_context([Document(text.path, text.text) for text in task.documents], tokenizer)
    size = config.evidence_block
    blocks = [(start, start + size) for start in range(0, context.tokens, size)]
    told = [blocks[token_of(context, *place) // size] for place in task.places]
    if not holds(cut(context, around(told, context, room)), task):
        raise Unsuitable(f"{room} tokens do not hold the places of this {task.kind} task")
    wanted = asked_tokens(task.question, tokenizer)
    rng.shuffle(blocks)
    shared = {block: wanted & said(context.ids[slice(*block)], tokenizer) for block in blocks}
    having = Counter(token for tokens in shared.values() for token in tokens)
    # The more alike, the likelier, in some tasks less, in others surely: retrieval heads go by more than words.
    # What many blocks share counts less: "file" and "path" of a question are no name.
    least = rng.random() ** 0.5
    alike = {
        block: rng.uniform(least, 1) * (1 + sum(math.log(len(blocks) / having[token]) for token in tokens))
        for block, tokens in shared.items()
    }
    for block in told:  # what answers is looked at more than what is alike: of 60 such names of click 33 were first so
        alike[block] *= rng.uniform(1, 2)
    ranked = sorted(blocks, key=lambda block: -alike[block])
    return cut(context, best_last(around([*told, *ranked], context, room), ranked))


def token_of(context: "Context", path: str, line: int) -> int:
    """The first token of a line."""
    file = next(file for file in context.files if file.path == path)
    character = file.line_ends[line - 2] + 1 if line > 1 else 0
    return file.start + len(file.header) + bisect_left(file.offsets, character)


def asked_tokens(question: str, tokenizer: "Tokenizer") -> set[int | str]:
    """Tokens and words that say what is asked about, as they stand in a sentence."""
    ids, starts = tokenizer.encode_with_offsets(question)
    counted = [i for i, counts in zip(ids, counted_tokens(question, starts), strict=True) if counts]
    return said(counted, tokenizer)


def said(ids: Sequence[int], tokenizer: "Tokenizer") -> set[int | str]:
    """The tokens, and the words of them: a name that stands there whole counts more than parts of it. With tokens alone
    14 of 60 questions which file defines a name had it in a passage of another file, where `nsa ask` mostly has one.
    """
    return {*ids, *re.findall(r"\w+", tokenizer.decode(ids))}


def holds(passages: "list[ContextFile]", task: "Task") -> bool:
    """Whether they say all that the documents say of the task's facts, and have its places."""
    told = [(part.path, range(part.first_line, part.first_line + len(part.line_ends))) for part in passages]
    if not all(any(path == place[0] and place[1] in lines for path, lines in told) for place in task.places):
        return False
    whole, kept = (" ".join(" ".join(t.text for t in texts).split()) for texts in (task.documents, passages))
    return all(fact in kept for fact in task.facts if fact in whole)
