"""A context that is read, or found read in the store, and the questions about it. Imports torch late."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.citations import check_citations, texts_in
from nsa_cli.evidence import counted_tokens, find_evidence, significant_blocks
from nsa_cli.output import VERBOSE, progress, say, silent, warn
from nsa_cli.reply import Answer, Timings, Usage
from nsa_cli.request import Request
from nsa_cli.reread import by_mass, named_paths, passages
from nsa_cli.settings import cache_dir
from nsa_cli.speed import remember
from nsa_cli.stop_strings import StopStrings
from nsa_models.errors import BudgetError

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_cli.context import Context, ContextFile
    from nsa_cli.schema import Schema
    from nsa_models import Cache, NSAConfig
    from nsa_models.constrain import Constraint
    from nsa_models.retrieval import RetrievalMass
    from nsa_models.tokenizer import Prompt

STORED_BLOCK = 64  # stored contexts hold whole blocks of this many tokens


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as text and as the tokens that the model said."""

    question: str
    answer: str
    ids: list[int] = field(repr=False)


class Conversation:
    """A context that has been read, and what was asked and answered about it since."""

    def __init__(self, checkpoint: Checkpoint, context: "Context", request: Request, capacity: int) -> None:
        """Read the context, or find it read in the store. capacity: tokens of the prompt and all that follows it."""
        self.checkpoint, self.context, self.request = checkpoint, context, request
        self.clock = time.perf_counter()
        assert checkpoint.model is not None  # loaded here, for the clock
        self.loaded = time.perf_counter()
        around = checkpoint.tokenizer.prompt("", request.system)
        self.before, self.document = len(around.before), around.before + context.ids
        self.shared = len(self.document) // STORED_BLOCK * STORED_BLOCK
        prompt = self.document + around.after
        self.stored: int | None
        self.cache, self.stored = read(checkpoint, prompt, self.shared, capacity, request)
        self.unread: list[int] | None = None  # tokens of the last answer that are not in the cache; None = no answer
        self.turns: list[Turn] = []

    def reset(self) -> None:
        """Forget what was asked."""
        self.cache.truncate(self.shared)
        self.unread, self.turns = None, []

    def resume(self, turns: Sequence["Turn"]) -> None:
        """Forget what was asked, and take these turns for it. Raises BudgetError where they do not fit."""
        from nsa_models import prefill

        self.reset()
        for turn in turns:
            rest, _ = self._next(turn.question)
            self._check_room(self.cache.length + len(rest), len(turn.ids))
            prefill(self.checkpoint.model, rest, self.cache)
            self.unread = turn.ids
            self.turns.append(turn)

    def _next(self, question: str) -> "tuple[list[int], Prompt]":
        """What is to be read before the answer to the next question, and the question in it."""
        wording, tokenizer = self.request.wording(question), self.checkpoint.tokenizer
        if self.unread is None:
            around = tokenizer.prompt(wording, self.request.system)
            return self.document[self.shared :] + around.after, around
        around = tokenizer.follow_up(wording, self.request.system)
        return self.unread + around.before + around.after, around

    def _check_room(self, prompt_tokens: int, longest: int) -> None:
        if prompt_tokens + longest > self.cache.capacity:
            raise BudgetError(
                f"the conversation takes {prompt_tokens:,} tokens and its answer up to {longest:,}; "
                f"{self.cache.capacity:,} fit: begin a new one, or lower --max-tokens"
            )

    def ask(self, question: str, tell: Callable[[str], None]) -> Answer:
        """Answer one more question, knowing those before it. Raises BudgetError, before anything is read, where it and
        its answer do not fit. Ctrl-C while it is read takes it back.
        """
        checkpoint, request, cache = self.checkpoint, self.request, self.cache
        rest, around = self._next(question)
        reused = cache.length if self.stored is None else self.stored  # the first question pays for the reading
        known, prompt_tokens = cache.length, cache.length + len(rest)
        self._check_room(prompt_tokens, request.sampling.max_tokens)
        try:
            logits, retrieval = read_question(checkpoint, rest, around, cache)
            closer, again, named = cache, 0, frozenset()
            if found := self._passages(retrieval):
                closer, logits, again = self._read_again(found, question)
                told = (f"{turn.question}\n{turn.answer}" for turn in self.turns)
                named = named_paths(found, "\n".join([*told, question]))
        except KeyboardInterrupt:
            cache.truncate(known)
            raise
        prefilled = time.perf_counter()
        text, ids, reason, first = generate(
            checkpoint, closer, logits, request, silent if request.schema else tell, named
        )
        self.unread = ids[cache.length - prompt_tokens :]
        self.turns.append(Turn(question, text, ids))
        data = _data(text, len(ids), reason, request.schema, tell) if request.schema else None
        reply = Answer(
            text,
            find_evidence(retrieval, self.context, self.before, request.evidence),
            Usage(prompt_tokens, reused, len(ids), again),
            Timings(
                self.loaded - self.clock, prefilled - self.loaded, time.perf_counter() - prefilled, first - self.clock
            ),
            checkpoint.name,
            reason,
            citations=check_citations(text if data is None else texts_in(data), self.context),
            data=data,
            peak_memory_bytes=peak_memory(checkpoint.model.device.type),
        )
        self.stored, self.clock, self.loaded = None, time.perf_counter(), time.perf_counter()
        return reply

    def _passages(self, retrieval: "RetrievalMass") -> "list[ContextFile]":
        """What is to be read again; nothing where the whole text is to answer."""
        limit = self.checkpoint.config.reread if self.request.reread is None else self.request.reread
        if not limit or self.context.tokens <= limit:
            return []
        found = passages(retrieval, self.context, self.before, limit)
        if not found and significant_blocks(retrieval):
            warn(f"--reread {limit} holds no passage: the answer comes from all of the text")
        return found

    def _read_again(self, found: "list[ContextFile]", question: str) -> "tuple[Cache, Tensor, int]":
        """Read the passages with the conversation until now: a cache that holds them, the logits that follow and the
        tokens that were read. Read by themselves they rank otherwise than in the whole text: then they are read a
        second time, in that order.
        """
        longest = self.request.sampling.max_tokens
        ids, around = self._prompt_of(found, question)
        cache, logits, mass = read_again(self.checkpoint, ids, around, longest)
        ranked = found if mass is None else by_mass(found, mass, self.before)
        if ranked == found:
            return cache, logits, len(ids)
        cache, logits, _ = read_again(self.checkpoint, *self._prompt_of(ranked, question), longest)
        return cache, logits, 2 * len(ids)

    def _prompt_of(self, found: "list[ContextFile]", question: str) -> "tuple[list[int], Prompt]":
        """The passages, the turns until now and the question, and the question in it."""
        tokenizer, system = self.checkpoint.tokenizer, self.request.system
        first, *later = (self.request.wording(asked) for asked in (*(turn.question for turn in self.turns), question))
        around = tokenizer.prompt(first, system)
        ids = [*around.before, *(i for part in found for i in part.ids), *around.after]
        for turn, asked in zip(self.turns, later, strict=True):
            around = tokenizer.follow_up(asked, system)
            ids += turn.ids + around.before + around.after
        return ids, around


def _data(text: str, tokens: int, reason: str, schema: "Schema", tell: Callable[[str], None]) -> object:
    """The value that the text is; nothing of it is told before it is known to be one."""
    if reason == "interrupted":
        raise KeyboardInterrupt
    value = schema.value(text, tokens, cut=reason == "length")
    tell(text)
    return value


def read(
    checkpoint: Checkpoint, prompt: Sequence[int], shared: int, capacity: int, request: Request
) -> tuple["Cache", int]:
    """A cache of `capacity` tokens holding at least the prompt's first `shared`, and how many of them were read before:
    held in memory, or stored.
    """
    from nsa_cli.store import Store
    from nsa_models import Cache, prefill

    model, digest, held = checkpoint.model, checkpoint.tokenizer.digest, request.held
    cache = held.take(prompt[:shared], capacity, model) if held else None
    if cache:
        return cache, shared
    if held:
        held.drop()  # before there is another of its size
    store = Store(cache_dir()) if request.store != "off" and shared else None
    anew = request.store == "refresh"
    found = store.open(model, digest, prompt[: shared + 1], capacity) if store and not anew else None
    if found and found.note:
        say(f"store: {found.note}", VERBOSE)
    cache = found.cache if found else Cache.for_model(model, capacity)
    stored, started = cache.length, time.perf_counter()
    writes = store is not None and request.store != "read"
    if stored < shared:
        try:
            with progress("reading", shared - stored) as advance:
                prefill(model, prompt[stored:shared], cache, progress=advance)
            if writes:
                remember(cache_dir(), checkpoint, stored, shared, time.perf_counter() - started)
        finally:  # what was read before Ctrl-C counts next time
            refusal = store.save(model, digest, prompt[:shared], cache, checkpoint.name, anew) if writes else None
            if refusal:
                warn(f"this context is not stored: {refusal}")
    if held:
        held.keep(prompt[:shared], cache)
    return cache, stored


def read_question(
    checkpoint: Checkpoint, rest: Sequence[int], around: "Prompt", cache: "Cache", looks: "NSAConfig | None" = None
) -> "tuple[Tensor, RetrievalMass]":
    """Read `rest`, which ends in the question and what follows it. Returns the logits that follow, and where the
    question's own words lead. looks: whose heads and blocks these are; None = the checkpoint's.
    """
    from nsa_models import prefill
    from nsa_models.retrieval import RetrievalMass

    model, document = checkpoint.model, len(rest) - len(around.after)
    if document:
        prefill(model, rest[:document], cache)
    text = checkpoint.tokenizer.decode(around.question)
    ids, starts = checkpoint.tokenizer.encode_with_offsets(text)
    counted = counted_tokens(text, starts) if ids == around.question else None  # bytes of no character have no word
    retrieval = RetrievalMass(looks or checkpoint.config, cache.length, counted)
    prefill(model, around.question, cache, retrieval=retrieval)
    return prefill(model, around.close, cache), retrieval


def read_again(
    checkpoint: Checkpoint, ids: Sequence[int], around: "Prompt", longest: int
) -> "tuple[Cache, Tensor, Tensor | None]":
    """A cache of its own for this prompt, which ends in a question, and an answer of up to `longest` tokens; the logits
    that follow; and the mass that the question's own words give each token, if the config has `reread_heads`.
    """
    from nsa_models import Cache, prefill

    model, config = checkpoint.model, checkpoint.config
    cache = Cache.for_model(model, len(ids) + longest)
    if not config.reread_heads:
        return cache, prefill(model, ids, cache), None
    to_tokens = replace(config, retrieval_heads=config.reread_heads, retrieval_block=1)
    logits, retrieval = read_question(checkpoint, ids, around, cache, to_tokens)
    return cache, logits, retrieval.mass.sum(0)


def generate(
    checkpoint, cache, logits, request: Request, tell: Callable, named: Iterable[str] = ()
) -> tuple[str, list[int], str, float]:
    """Decode to text, piece by piece. Returns the text, its token ids, the finish reason and when the first token came
    (perf_counter). named: the paths that an answer without a schema may name in their folders; none = any.
    """
    from nsa_models import decode

    tokenizer, most = checkpoint.tokenizer, request.sampling.max_tokens
    stream, stops = tokenizer.stream(), StopStrings(request.stop)
    constraint = _constraint(checkpoint, request.schema, named)
    pieces: list[str] = []
    ids: list[int] = []
    interrupted, first = False, 0.0

    def out(text: str) -> None:
        text = text if pieces else text.lstrip()
        if text:
            pieces.append(text)
            tell(text)

    try:
        for token in decode(
            checkpoint.model, cache, logits, request.sampling, eos_ids=tokenizer.eos_ids, constraint=constraint
        ):
            first = first or time.perf_counter()
            ids.append(token)
            out(stops.push(stream.push(token)))
            if stops.found:
                break
    except KeyboardInterrupt:
        interrupted = True
    if not stops.found:
        out(stops.push(stream.end()) + stops.end())
    reason = "interrupted" if interrupted else "stop" if stops.found or len(ids) < most else "length"
    return "".join(pieces), ids, reason, first or time.perf_counter()


def _constraint(checkpoint: Checkpoint, schema: "Schema | None", named: Iterable[str]) -> "Constraint | None":
    from nsa_models.constrain import Constraint, of_paths, of_schema

    tokenizer, size = checkpoint.tokenizer, checkpoint.config.vocab_size
    if schema:
        return Constraint(tokenizer, size, of_schema(schema.json))
    grammar = of_paths(named) if tokenizer.eos_ids else None
    return Constraint(tokenizer, size, grammar, "paths of the passages") if grammar else None


def peak_memory(device: str) -> int:
    """Most bytes that this process has held at a time: of the GPU, or on a CPU of main memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
