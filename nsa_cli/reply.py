"""What comes of a question: the answer with evidence, citations and what it cost, and how it is shown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, replace

from nsa_cli.citations import Citation
from nsa_cli.evidence import Evidence
from nsa_cli.output import VERBOSE, emit, say, warn
from nsa_cli.runlog import log_answer
from nsa_cli.units import format_bytes
from nsa_models.errors import CheckError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # of the prompt, from the store
    completion_tokens: int
    reread_tokens: int = 0  # of prompts with the passages that the question leads to, one or, in a better order, two


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
