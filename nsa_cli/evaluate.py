"""What `nsa eval` measures and how it is shown. Imports torch late."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.held import Held
from nsa_cli.output import progress, warn

if TYPE_CHECKING:
    from nsa_cli.evidence import Evidence
    from nsa_models.evaluate import Measure, Trial
    from nsa_models.tokenizer import Tokenizer
    from nsa_models.training.data import Corpus, Layout
    from nsa_models.training.tasks import Task

SCHEMA_VERSION = 1
PERPLEXITY, SHORT = "perplexity", "short"  # not tasks over the texts
ASK = "ask"  # NSA as `nsa ask` answers with it


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    attentions: tuple[str, ...]
    depths: tuple[float, ...]
    samples: int  # per depth; of perplexity: windows of a text
    texts: tuple[str, ...]  # sources and paths
    seed: int = 0
    wording: str = "usual"


@dataclass(frozen=True)
class Row:
    """One task at one length under one kind of attention."""

    task: str
    length: int
    attention: str
    tokens_read: int  # by the last query, per key head
    measure: "Measure"
    trials: "list[Trial]"

    def to_json(self) -> dict:
        m = self.measure
        value = None if m.samples == 0 else round(m.value, 4)
        return {
            "task": self.task,
            "length": self.length,
            "attention": self.attention,
            "tokens_read": self.tokens_read,
            "value": value,
            "low": round(m.low, 4),
            "high": round(m.high, 4),
            "samples": m.samples,
            "trials": [
                {
                    "depth": t.depth,
                    "tokens": t.tokens,
                    "place": t.task.place,
                    "question": t.task.question,
                    "answer": t.task.answer,
                    "reply": t.reply,
                    "right": t.right,
                    **({} if t.named is None else {"named": t.named}),
                }
                for t in self.trials
            ],
        }


class Step(NamedTuple):
    """What makes a row. `prompts`: how often `measure` calls what it is given, for progress."""

    task: str
    length: int
    attention: str
    prompts: int
    measure: "Callable[[Callable[[], None]], tuple[Measure, list[Trial]]]"


def measure(checkpoint: Checkpoint, plan: Plan) -> list[Row]:
    """Every task at every length, the attentions one after the other on the same prompts."""
    from nsa_models.errors import InputError
    from nsa_models.evaluate import tokens_read
    from nsa_models.training.data import Corpus

    check_lengths(checkpoint, plan.lengths)
    corpus = Corpus(texts(plan.texts)) if set(plan.tasks) - {SHORT} else Corpus([])
    makers = {SHORT: short_steps, PERPLEXITY: perplexity_steps}
    others = partial(task_steps, held=Held())  # what two kinds of task ask about one text, they ask of one reading
    steps = [step for task in plan.tasks for step in makers.get(task, others)(checkpoint, plan, corpus, task)]
    if not steps:
        lengths = " or ".join(f"{n:,}" for n in plan.lengths)
        raise InputError(f"the texts are too short to measure anything at {lengths}; shorter --lengths, or more --text")
    total, done, rows = sum(step.prompts for step in steps), 0, []
    with progress("evaluating", total, "prompts") as advance:

        def one() -> None:
            nonlocal done
            done += 1
            advance(done, total)

        for step in steps:
            read = tokens_read(checkpoint.model, step.attention, step.length)
            rows.append(Row(step.task, step.length, step.attention, read, *step.measure(one)))
    return rows


def over_ids(plan: Plan) -> list[str]:
    """Attentions that need no document with a question."""
    return [attention for attention in plan.attentions if attention != ASK]


def perplexity_steps(checkpoint: Checkpoint, plan: Plan, corpus: "Corpus", task: str) -> Iterator[Step]:
    from nsa_models.evaluate import perplexity

    ids = checkpoint.tokenizer.encode("".join(d.text for d in corpus.documents))
    lengths = within(plan.lengths, len(ids), task)
    if not lengths:
        return
    longest, scored = max(lengths), min(lengths) - 1
    for n, attention in product(lengths, over_ids(plan)):

        def value(one, n=n, attention=attention):
            where = (checkpoint.model, ids, n, attention, plan.samples)
            return perplexity(*where, longest=longest, scored=scored, done=one), []

        yield Step(task, n, attention, min(plan.samples, len(ids) // longest), value)


def within(lengths: Sequence[int], tokens: int, task: str) -> list[int]:
    """The lengths that texts of so many tokens have. A row of 131,072 tokens that were asked of psutil's 93,125 would
    say what was not measured.
    """
    kept = [n for n in lengths if n <= tokens]
    if len(kept) < len(lengths):
        warn(f"the texts have {tokens:,} tokens: no {task} beyond")
    return kept


def short_steps(checkpoint: Checkpoint, plan: Plan, corpus: "Corpus", task: str) -> Iterator[Step]:
    """Short questions have the lengths that they have."""
    from nsa_models.evaluate import SHORT_REPLY, ask_short, share
    from nsa_models.training.tasks import short_tasks

    questions = short_tasks()
    for attention in over_ids(plan):

        def value(one, attention=attention):
            trials = ask_short(checkpoint.model, checkpoint.tokenizer, attention, one)
            return share(trials), trials

        longest = max(len(checkpoint.tokenizer.encode(task.question)) for task in questions)
        yield Step(task, longest + SHORT_REPLY, attention, len(questions), value)


def task_steps(checkpoint: Checkpoint, plan: Plan, corpus: "Corpus", task: str, held: Held) -> Iterator[Step]:
    from nsa_cli.train import layout
    from nsa_models.evaluate import ask_tasks, share, tasks

    arranged = layout(checkpoint.tokenizer, checkpoint.config)
    tokens = tokens_in((text.text for text in corpus.documents), checkpoint.tokenizer, max(plan.lengths))
    for n, attention in product(within(plan.lengths, tokens, task), plan.attentions):

        def value(one, n=n, attention=attention):
            asked = tasks(arranged, corpus, task, n, plan.depths, plan.samples, plan.seed, plan.wording)
            if attention == ASK:
                trials = list(ask_as_the_command(checkpoint, arranged, asked, held, one))
            else:
                trials = ask_tasks(checkpoint.model, arranged, asked, attention, one)
            return share(trials), trials

        yield Step(task, n, attention, len(plan.depths) * plan.samples, value)


def tokens_in(texts: Iterable[str], tokenizer: "Tokenizer", enough: int) -> int:
    """Of all texts, or of as many as have `enough`."""
    tokens = 0
    for text in texts:
        tokens += len(tokenizer.encode(text))
        if tokens >= enough:
            break
    return tokens


def ask_as_the_command(
    checkpoint: Checkpoint,
    arranged: "Layout",
    asked: "Iterable[tuple[Task | None, float]]",
    held: Held,
    done: Callable[[], None],
) -> "Iterator[Trial]":
    """What `nsa ask` answers to these tasks; the text that is held is not read again."""
    from nsa_cli.answer import answer
    from nsa_cli.context import build_context
    from nsa_cli.documents import Document
    from nsa_cli.output import silent
    from nsa_cli.request import Request
    from nsa_models.evaluate import Trial, longest_reply
    from nsa_models.sampling import Sampling
    from nsa_models.training.tasks import is_right

    for task, depth in asked:
        if task is not None:
            context = build_context([Document(text.path, text.text) for text in task.documents], checkpoint.tokenizer)
            most = longest_reply(arranged.asked(task)[1])
            request = Request(Sampling(max_tokens=most), store="off", held=held)
            reply = answer(checkpoint, context, task.question, request, silent)
            right, named = is_right(task, reply.text), are_named(task, reply.evidence)
            yield Trial(task, reply.usage.prompt_tokens, depth, reply.text, right, named)
        done()


def are_named(task: "Task", evidence: "Sequence[Evidence]") -> bool | None:
    """Whether evidence names every place that the answer takes; None where the answer is that there is none."""
    if task.kind == "absent":
        return None
    return all(any(e.path == path and e.start <= line <= e.end for e in evidence) for path, line in task.places)


def texts(names: Sequence[str]) -> list:
    """Documents of sources and of paths, in the order of the names."""
    from nsa_cli.train import path_texts, source_texts
    from nsa_models.errors import InputError
    from nsa_models.training.sources import SOURCES

    found = [text for name in names for text in (source_texts(name) if name in SOURCES else path_texts(name))]
    if not found:
        raise InputError(f"{', '.join(names)}: no text to read")
    return found


def check_lengths(checkpoint: Checkpoint, lengths: Sequence[int]) -> None:
    from nsa_models.errors import BudgetError, InputError

    limit = checkpoint.config.max_position_embeddings
    if max(lengths) > limit:
        raise BudgetError(f"{max(lengths):,} tokens are more than the {limit:,} that {checkpoint.name} is made for")
    if min(lengths) < 2:
        raise InputError(f"nothing can be measured at {min(lengths)} tokens; --lengths begins at 2")


def table(rows: Sequence[Row]) -> str:
    """Tasks and lengths down, attentions across: figure and 95 % interval, and how many tokens a query reads."""
    attentions = list(dict.fromkeys(row.attention for row in rows))
    cells = {(row.task, row.length, row.attention): row for row in rows}
    lines = [["task", "tokens", *attentions]]
    for task, length in dict.fromkeys((row.task, row.length) for row in rows):
        found = [cells.get((task, length, attention)) for attention in attentions]
        lines.append([task, f"{length:,}", *("" if row is None else cell(row) for row in found)])
    for length in dict.fromkeys(row.length for row in rows):
        read = {row.attention: f"{row.tokens_read:,}" for row in rows if row.length == length}
        lines.append(["(read per step)", f"{length:,}", *(read.get(a, "") for a in attentions)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines)


def cell(row: Row) -> str:
    m = row.measure
    if row.task == PERPLEXITY:
        return f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}]"
    if not m.samples:
        return "none in the text"
    named = [t.named for t in row.trials if t.named is not None]
    also = f", named {100 * sum(named) / len(named):.0f} %" if named else ""
    return f"{100 * m.value:.0f} % [{100 * m.low:.0f}, {100 * m.high:.0f}]{also}"


def as_json(checkpoint: Checkpoint, plan: Plan, rows: Sequence[Row]) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": checkpoint.name,
        "fingerprint": checkpoint.model.fingerprint,
        "plan": asdict(plan),
        "results": [row.to_json() for row in rows],
    }


def heat_map(rows: Sequence[Row], file: Path, task: str, attention: str) -> None:
    """Right answers by depth and length, as a PNG."""
    from nsa_models.training.plot import NoPlot, plot_heat_map

    chosen = [row for row in rows if (row.task, row.attention) == (task, attention)]
    depths = sorted({t.depth for row in chosen for t in row.trials})
    if not depths:
        warn(f"no heat map: nothing was asked of {task}")
        return

    def at(row: Row, depth: float) -> float | None:
        right = [t.right for t in row.trials if t.depth == depth]
        return sum(right) / len(right) if right else None

    try:
        plot_heat_map(
            [f"{100 * depth:.0f} %" for depth in depths],
            [f"{row.length:,}" for row in chosen],
            [[at(row, depth) for row in chosen] for depth in depths],
            file,
            f"{task}, {attention}: right answers, %",
        )
    except NoPlot as error:
        warn(str(error))
