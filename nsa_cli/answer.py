"""Context -> (stored cache | prefill) -> answer: the one line that all commands that ask share. Imports torch late."""

import json
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import TYPE_CHECKING

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.citations import Citation, check_citations, texts_in
from nsa_cli.evidence import Evidence, counted_tokens, find_evidence, significant_blocks
from nsa_cli.held import Held
from nsa_cli.output import VERBOSE, emit, progress, say, warn
from nsa_cli.reread import passages
from nsa_cli.runlog import log_answer
from nsa_cli.settings import cache_dir
from nsa_cli.speed import remember
from nsa_cli.units import format_bytes
from nsa_models.errors import BudgetError, CheckError
from nsa_models.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_cli.context import Context
    from nsa_cli.schema import Schema
    from nsa_models import Cache
    from nsa_models.retrieval import RetrievalMass
    from nsa_models.tokenizer import Prompt

SCHEMA_VERSION = 1
STORE_MODES = ("use", "read", "refresh", "off")  # of stored contexts
FIT_SHARE = 0.9  # of free memory: what is free changes until it is taken
STORED_BLOCK = 64  # stored contexts hold whole blocks of this many tokens


@dataclass(frozen=True)
class Request:
    """How to answer, apart from the question and the document."""

    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    system: str | None = None  # None = the chat template's own
    max_context: int | None = None  # most tokens of prompt and answer; None = what the model was made for
    store: str = "use"  # STORE_MODES
    evidence: int = 5  # most places to name
    reread: int | None = None  # tokens of the passages that the answer comes from; 0 = of all; None = the checkpoint's
    held: Held | None = None  # keeps what was read in memory, for the next question about it
    schema: "Schema | None" = None  # the answer is JSON of this schema
    fit: bool = False  # max_context is what free memory holds, if that is less

    def of_all(self) -> "Request":
        """The same for what concerns a whole text and is seldom at a few places: reread only if it says so."""
        return replace(self, reread=self.reread or 0)

    def wording(self, question: str) -> str:
        """The question as the model gets it."""
        return f"{question}\n\n{self.schema.instruction()}" if self.schema else question


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # of the prompt, from the store
    completion_tokens: int
    reread_tokens: int = 0  # of a second prompt, with the passages that the question leads to


@dataclass(frozen=True)
class Timings:
    load_s: float
    prefill_s: float
    decode_s: float
    first_token_s: float  # from before the model was loaded to the answer's first token

    @property
    def total_s(self) -> float:
        return self.load_s + self.prefill_s + self.decode_s


@dataclass(frozen=True)
class Answer:
    """What `--json` prints. finish_reason: stop (the model or a stop string ended it), length or interrupted.
    data: the value that the text is, where there was a schema.
    """

    text: str
    evidence: list[Evidence] = field(repr=False)
    usage: Usage
    timings: Timings
    model: str
    finish_reason: str
    shards: int = 1  # parts the document was read in
    citations: Sequence[Citation] = field(default=(), repr=False)
    data: object = None
    peak_memory_bytes: int = 0  # most that this process has held until now; on a GPU, of the GPU's

    def flaw(self) -> str:
        """What to warn of, or an empty text."""
        if self.finish_reason == "length":
            at = f" at {self.usage.completion_tokens:,} tokens" if self.shards == 1 else ""  # else those of all parts
            return f"the answer was cut{at}; --max-tokens gives it more"
        return "" if self.text else "the model ended its answer before the first word"

    def to_json(self) -> dict:
        return {
            "schema_version": SCHEMA_VERSION,
            "answer": self.text,
            **({"data": self.data} if self.data is not None else {}),
            "evidence": [e.to_json() for e in self.evidence],
            "citations": [c.to_json() for c in self.citations],
            "usage": asdict(self.usage),
            "timings": {name: round(seconds, 3) for name, seconds in asdict(self.timings).items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "model": self.model,
            "finish_reason": self.finish_reason,
            "shards": self.shards,
        }


def answer(
    checkpoint: Checkpoint,
    context: "Context",
    question: str,
    request: Request,
    tell: Callable[[str], None],
) -> Answer:
    """Read the context, or find it read in the store, and answer the question. tell: gets the text as it comes, or at
    its end where it has a schema.

    What is stored ends at a block border before the question, and a stored context is entered at that same border: the
    model computes the same either way. Ctrl-C while generating keeps what was said; while reading, what was read.
    Raises BudgetError if prompt and answer do not fit the model, --max-context or memory, and CheckError if the answer
    is not of the schema.
    """
    (reply,) = answers(checkpoint, context, [question], request, tell)
    return reply


def answers(
    checkpoint: Checkpoint,
    context: "Context",
    questions: Sequence[str],
    request: Request,
    tell: Callable[[str], None],
) -> Iterator[Answer]:
    """The same for several questions, each on its own: the context is read once, and each enters where it ends."""
    prompts = [checkpoint.tokenizer.prompt(request.wording(question), request.system) for question in questions]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].after))
    around = len(prompts[longest].before) + len(prompts[longest].after)
    capacity = around + len(context.ids) + request.sampling.max_tokens
    check_fit(checkpoint, context, questions[longest], request, capacity)
    conversation = Conversation(checkpoint, context, request, capacity)
    for question in questions:
        conversation.reset()
        yield conversation.ask(question, tell)


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
            again = self._passages(question, retrieval)
            closer = cache
            if again:
                closer, logits = read_again(checkpoint, again, request.sampling.max_tokens)
        except KeyboardInterrupt:
            cache.truncate(known)
            raise
        prefilled = time.perf_counter()
        text, ids, reason, first = generate(checkpoint, closer, logits, request, silent if request.schema else tell)
        self.unread = ids[cache.length - prompt_tokens :]
        self.turns.append(Turn(question, text, ids))
        data = _data(text, len(ids), reason, request.schema, tell) if request.schema else None
        reply = Answer(
            text,
            find_evidence(retrieval, self.context, self.before, request.evidence),
            Usage(prompt_tokens, reused, len(ids), len(again)),
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

    def _passages(self, question: str, retrieval: "RetrievalMass") -> list[int]:
        """The prompt of a second reading, with the conversation until now; empty where the whole text is to answer."""
        limit = self.checkpoint.config.reread if self.request.reread is None else self.request.reread
        if not limit or self.context.tokens <= limit:
            return []
        found = passages(retrieval, self.context, self.before, limit)
        if not found:
            if significant_blocks(retrieval):
                warn(f"--reread {limit} holds no passage: the answer comes from all of the text")
            return []
        tokenizer, system = self.checkpoint.tokenizer, self.request.system
        first, *later = (self.request.wording(asked) for asked in (*(turn.question for turn in self.turns), question))
        around = tokenizer.prompt(first, system)
        ids = [*around.before, *(i for part in found for i in (*part.header, *part.body)), *around.after]
        for turn, asked in zip(self.turns, later, strict=True):
            around = tokenizer.follow_up(asked, system)
            ids += turn.ids + around.before + around.after
        return ids


def _data(text: str, tokens: int, reason: str, schema: "Schema", tell: Callable[[str], None]) -> object:
    """The value that the text is; nothing of it is told before it is known to be one."""
    if reason == "interrupted":
        raise KeyboardInterrupt
    value = schema.value(text, tokens, cut=reason == "length")
    tell(text)
    return value


def combined(parts: Sequence[Answer], last: Answer, limit: int) -> Answer:
    """The last answer, with the evidence and citations of the parts it came from and what all of them cost."""
    every = [*parts, last]
    evidence = sorted((e for part in every for e in part.evidence), key=lambda e: -e.lift)
    return replace(
        last,
        evidence=evidence[:limit],
        usage=Usage(*map(sum, zip(*(astuple(a.usage) for a in every), strict=True))),
        timings=replace(
            Timings(*map(sum, zip(*(astuple(a.timings) for a in every), strict=True))),
            first_token_s=sum(a.timings.total_s for a in parts) + last.timings.first_token_s,
        ),
    )


def silent(text: str) -> None:
    """What to tell nobody with."""


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


def read_question(checkpoint: Checkpoint, rest: Sequence[int], around: "Prompt", cache: "Cache"):
    """Read `rest`, which ends in the question and what follows it. Returns the logits that follow, and where the
    question's own words lead.
    """
    from nsa_models import prefill
    from nsa_models.retrieval import RetrievalMass

    model, document = checkpoint.model, len(rest) - len(around.after)
    if document:
        prefill(model, rest[:document], cache)
    text = checkpoint.tokenizer.decode(around.question)
    ids, starts = checkpoint.tokenizer.encode_with_offsets(text)
    counted = counted_tokens(text, starts) if ids == around.question else None  # bytes of no character have no word
    retrieval = RetrievalMass(checkpoint.config, cache.length, counted)
    prefill(model, around.question, cache, retrieval=retrieval)
    return prefill(model, around.close, cache), retrieval


def read_again(checkpoint: Checkpoint, ids: list[int], longest: int) -> tuple["Cache", "Tensor"]:
    """A cache of its own for this prompt and an answer of up to `longest` tokens, and the logits that follow."""
    from nsa_models import Cache, prefill

    cache = Cache.for_model(checkpoint.model, len(ids) + longest)
    return cache, prefill(checkpoint.model, ids, cache)


def generate(checkpoint, cache, logits, request: Request, tell: Callable) -> tuple[str, list[int], str, float]:
    """Decode to text, piece by piece. Returns the text, its token ids, the finish reason and when the first token came
    (perf_counter).
    """
    from nsa_models import decode
    from nsa_models.constrain import Constraint

    tokenizer, most = checkpoint.tokenizer, request.sampling.max_tokens
    stream, stops = tokenizer.stream(), StopStrings(request.stop)
    schema = request.schema
    constraint = Constraint(tokenizer, checkpoint.config.vocab_size, schema.json) if schema else None
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


def peak_memory(device: str) -> int:
    """Most bytes that this process has held at a time: of the GPU, or on a CPU of main memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StopStrings:
    """Passes text on up to the first stop string; holds back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string."""
        if self.found:
            return ""
        text, self.held = self.held + text, ""
        hits = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if hits:
            self.found = True
            return text[: min(hits)]
        starts = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        cut = len(text) - max(starts, default=0)
        self.held = text[cut:]
        return text[:cut]

    def end(self) -> str:
        """What was held back, when no text will follow."""
        text, self.held = self.held, ""
        return text


def show(reply: Answer, as_json: bool, **about: str) -> None:
    """End the answer on stdout and give evidence, citations and timings on stderr; or print everything as JSON.

    about: more keys of the JSON, such as which question this answers.
    """
    if as_json:
        emit(json.dumps(reply.to_json() | about, ensure_ascii=False) + "\n")
    else:
        emit("" if reply.text.endswith("\n") else "\n")
        for line in (*reply.evidence, *reply.citations):
            say(str(line))
        say(timing_line(reply))
        say(
            f"first token after {reply.timings.first_token_s:.1f} s · "
            f"{format_bytes(reply.peak_memory_bytes)} of memory at most",
            VERBOSE,
        )
    if reply.flaw():
        warn(reply.flaw())
    log_answer(reply.to_json())
    if reply.finish_reason == "interrupted":
        raise KeyboardInterrupt


def require_citations(replies: Sequence[Answer]) -> None:
    """Raise CheckError if an answer quotes, or refers to, what the text does not hold."""
    citations = [citation for reply in replies for citation in reply.citations]
    missing = [citation for citation in citations if not citation.found]
    if missing:
        raise CheckError(f"{len(missing)} of {len(citations)} citations are not in the text: {missing[0].text}")


def timing_line(reply: Answer) -> str:
    use, took = reply.usage, reply.timings
    read = use.prompt_tokens - use.cached_tokens
    stored = f" ({use.cached_tokens:,} stored)" if use.cached_tokens else ""
    again = f" and {use.reread_tokens:,} again" if use.reread_tokens else ""
    rate = _rate(read + use.reread_tokens, took.prefill_s)
    return (
        f"prefill {use.prompt_tokens:,} tokens{stored}{again} in {took.prefill_s:.1f} s, {rate} · "
        f"{use.completion_tokens:,} tokens in {took.decode_s:.1f} s, {_rate(use.completion_tokens, took.decode_s)}"
    )


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
