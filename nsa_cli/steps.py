"""A recipe over a context: its steps one after the other, each asked about every part of what it reads."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nsa_cli.answer import answer
from nsa_cli.budget import document_room
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.checks import failed_checks
from nsa_cli.citations import check_citations, texts_in
from nsa_cli.output import say, silent, warn
from nsa_cli.packing import Packing, pack
from nsa_cli.recipe import Recipe, Step
from nsa_cli.reply import Answer, combined
from nsa_cli.request import Request
from nsa_models.errors import CheckError, InputError
from nsa_models.sampling import Sampling

if TYPE_CHECKING:
    from nsa_cli.context import Context
    from nsa_cli.documents import Document, Skip


@dataclass(frozen=True)
class PartAnswer:
    """What a step answered about one part."""

    label: str
    reply: Answer

    def to_json(self) -> dict:
        data = {} if self.reply.data is None else {"data": self.reply.data}
        return {"part": self.label, "answer": self.reply.text, **data}


@dataclass(frozen=True)
class RecipeAnswer(Answer):
    """The last step's answer: where that read several parts, all of them under headings, or as one JSON list.

    Evidence, usage and timings are those of all steps. failed: the expectations that were not met, in words.
    """

    recipe: str = ""
    parts: Sequence[PartAnswer] = field(default=(), repr=False)
    failed: Sequence[str] = ()

    def flaw(self) -> str:
        """Each part that was cut was warned of when it was read."""
        return "" if self.finish_reason == "length" else super().flaw()

    def to_json(self) -> dict:
        own = {"recipe": self.recipe, "parts": [part.to_json() for part in self.parts], "failed": list(self.failed)}
        return super().to_json() | own

    def require(self) -> None:
        """Raise CheckError if an expectation was not met."""
        if self.failed:
            raise CheckError(f"recipe {self.recipe}: {'; '.join(self.failed)}")


def pack_for(
    recipe: Recipe,
    documents: Sequence["Document"],
    skips: Sequence["Skip"],
    checkpoint: Checkpoint,
    request: Request,
    packing: Packing,
    explicit: Collection[str] = (),
) -> "Context":
    """The context that a bound recipe's steps read, packed as it says; explicit as for `run_recipe`."""
    step = max((step for step in recipe.steps if not step.inputs), key=lambda step: len(step.prompt))
    asked = _request(recipe, step, request, explicit)
    return pack(documents, skips, checkpoint, step.prompt, asked, recipe.packed(packing, explicit))


def run_recipe(
    checkpoint: Checkpoint,
    recipe: Recipe,
    context: "Context",
    request: Request,
    tell: Callable[[str], None] = silent,
    explicit: Collection[str] = (),
) -> RecipeAnswer:
    """Run a bound recipe (`Recipe.bind`) over a context read with its `read_options`.

    explicit: names of Sampling's and Request's fields in which `request` decides; else the recipe does where it says
    something. tell: gets the last step's answer as it comes. Raises InputError, BudgetError, CheckError for an answer
    that is not of its schema, and KeyboardInterrupt before the last step's last part; expectations that were not met
    are in the answer's `failed`.
    """
    if recipe.params:
        raise ValueError("bind the recipe first")
    from nsa_cli.parts import excerpts

    sources = excerpts(context, recipe.match, recipe.around) if recipe.match else context
    answered: dict[str, list[PartAnswer]] = {}
    for step in recipe.steps:
        told = tell if step is recipe.steps[-1] else silent
        asked = _request(recipe, step, request, explicit)
        if step.inputs:
            text = _join(checkpoint, [part for name in step.inputs for part in answered[name]])
            asked = replace(asked, store="off", held=None, evidence=0)  # they are read once, and are no place to look
        else:
            text = sources
        answered[step.id] = _ask_parts(checkpoint, step, text, asked, told)
    return _assemble(recipe, answered, context, request)


def _request(recipe: Recipe, step: Step, request: Request, explicit: Collection[str]) -> Request:
    """How this step asks: as the command line says, then the step, the recipe and `request`. But the command line asks
    for an answer: what an earlier step says about its own, such as how short the notes are, stays.
    """
    from nsa_cli.schema import parse_schema

    own: dict[str, object] = {name: getattr(recipe, name) for name in ("system", "max_context", "evidence", "reread")}
    own = {name: value for name, value in (own | dict(recipe.generate)).items() if name not in explicit}
    last = step is recipe.steps[-1]
    asks = {"system": step.system, **step.generate}
    own |= {name: value for name, value in asks.items() if value is not None and not (last and name in explicit)}
    own = {name: value for name, value in own.items() if value is not None}
    if "stop" in own:
        own["stop"] = tuple(own["stop"])
    generate = {name: own.pop(name) for name in Sampling.__dataclass_fields__ if name in own}
    schema = parse_schema(step.schema) if step.schema is not None else None
    return replace(request.of_all(), sampling=replace(request.sampling, **generate), schema=schema, **own)


def _join(checkpoint: Checkpoint, answers: Sequence[PartAnswer]) -> "Context":
    """Earlier answers as a context of their own, one document each."""
    from nsa_cli.context import build_context
    from nsa_cli.documents import Document

    documents = [Document(part.label or "notes", part.reply.text) for part in answers if part.reply.text.strip()]
    if not documents:
        raise InputError("the earlier steps answered nothing to go on from")
    return build_context(documents, checkpoint.tokenizer)


def _ask_parts(checkpoint, step: Step, text: "Context", request: Request, tell) -> list[PartAnswer]:
    from nsa_cli.parts import parts

    pieces = parts(text, step.over, document_room(checkpoint, step.prompt, request))
    many = len(pieces) > 1
    found = []
    for number, part in enumerate(pieces, 1):
        if many:
            say(f"nsa: {step.id} {number} of {len(pieces)}: {part.label}, {len(part.context.ids):,} tokens")
        told = tell if not request.schema or not many else silent  # several values are one JSON list in the end
        if many and told is not silent:
            told("\n\n" * (number > 1) + _heading(part.label))
        reply = answer(checkpoint, part.context, step.prompt, request, told)
        if reply.finish_reason == "interrupted" and (tell is silent or number < len(pieces)):
            raise KeyboardInterrupt
        if reply.finish_reason == "length":
            label = f" about {part.label}" if part.label else ""
            warn(f"step {step.id}: the answer{label} was cut at {reply.usage.completion_tokens:,} tokens")
        found.append(PartAnswer(part.label, reply))
    if many and request.schema:
        tell(_list([part.reply for part in found])[0])
    return found


def _heading(label: str) -> str:
    return f"## {label}\n\n"


def _list(replies: Sequence[Answer]) -> tuple[str, list]:
    """The values of all parts as one JSON list, an item a line; values that are lists give their items."""
    values: list = []
    for reply in replies:
        values += reply.data if isinstance(reply.data, list) else [reply.data]
    lines = ",\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    return f"[\n{lines}\n]" if values else "[]", values


def _assemble(recipe: Recipe, answered: dict[str, list[PartAnswer]], context: "Context", request: Request):
    every = [part.reply for parts in answered.values() for part in parts]
    final = answered[recipe.steps[-1].id]
    replies = [part.reply for part in final]
    text, data = replies[-1].text, replies[-1].data
    if len(final) > 1 and data is not None:
        text, data = _list(replies)
    elif len(final) > 1:
        text = "\n\n".join(_heading(part.label) + part.reply.text for part in final)
    whole = combined(every[:-1], every[-1], request.evidence if recipe.evidence is None else recipe.evidence)
    reasons = {reply.finish_reason for reply in replies}
    reply = RecipeAnswer(
        text,
        whole.evidence,
        whole.usage,
        whole.timings,
        whole.model,
        next(reason for reason in ("interrupted", "length", "stop") if reason in reasons),
        max(len(parts) for parts in answered.values()),
        check_citations(text if data is None else texts_in(data), context),
        data,
        whole.peak_memory_bytes,
        recipe.name,
        final,
    )
    return replace(reply, failed=failed_checks(recipe.expect, reply))
