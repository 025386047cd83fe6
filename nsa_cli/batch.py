"""Jobs -> records: grouped by document, answered one after the other, what went wrong in a record of its own."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from nsa_cli.answer import answer
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.documents import Document, ReadOptions, Skip, read_documents
from nsa_cli.held import Held
from nsa_cli.jobs import Job, groups
from nsa_cli.output import describe, progress, say, say_skipped, silent
from nsa_cli.packing import Packing, pack, room_beside
from nsa_cli.recipe import Recipe, find_recipe, load_recipe
from nsa_cli.records import RecordFile, RecordStream
from nsa_cli.reply import SCHEMA_VERSION, Answer
from nsa_cli.request import Request
from nsa_cli.schema import parse_schema
from nsa_cli.steps import pack_for, run_recipe
from nsa_cli.summarize import ask_about
from nsa_models.errors import BatchError, InputError

if TYPE_CHECKING:
    from nsa_cli.context import Context

TEXT = "text"  # how a job's own text is shown as a path


@dataclass(frozen=True)
class Settings:
    """What all jobs of a batch share. reproducible: records without what differs from run to run."""

    read: ReadOptions
    request: Request
    reproducible: bool = False
    explicit: frozenset[str] = frozenset()  # what was typed of request and packing: there a recipe does not decide
    packing: Packing = Packing()

    def digest(self, job: Job, model: str) -> str:
        """12 hex digits of what an answer depends on: the job, these settings and the model (its fingerprint)."""
        request = replace(self.request, held=None, store="use", fit=False)  # neither changes an answer
        about = [asdict(replace(job, line=0, id=None)), asdict(request), asdict(self.read), self.reproducible, model]
        about += [asdict(self.packing)] if self.packing != Packing() else []
        if job.recipe:
            about += [sorted(self.explicit), recipe_text(job.recipe)]
        text = json.dumps(about, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """A job with all that answering it takes, so that it can be answered on another machine.

    failed: what went wrong before that, with its exit code.
    """

    job: Job
    documents: Sequence[Document] = ()
    skips: Sequence[Skip] = ()
    recipe: Recipe | None = None
    failed: tuple[str, int] | None = None


class Reader:
    """Jobs -> tasks. Documents are read anew when they are not those of the job before."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.read: tuple | None = None  # what `documents` and `skips` were read from
        self.documents: Sequence[Document] = ()
        self.skips: Sequence[Skip] = ()

    def task(self, job: Job) -> Task:
        try:
            if job.problem:
                raise InputError(job.problem)
            recipe = load_recipe(job.recipe).bind(job.params) if job.recipe else None
            options = recipe.read_options(self.settings.read) if recipe else self.settings.read
            if self.read != (job.document, options):
                self.read = None
                self.documents, self.skips = documents_of(job, options)
                self.read = job.document, options
        except Exception as error:
            return Task(job, failed=describe(error))
        return Task(job, self.documents, self.skips, recipe)


def documents_of(job: Job, options: ReadOptions) -> tuple[list[Document], list[Skip]]:
    if job.text is not None:
        return [Document(TEXT, job.text)], []
    documents, skips = read_documents(job.paths, options)
    say_skipped(skips)
    return documents, skips


class Worker:
    """Tasks -> records, with one checkpoint. The context of the last task stays encoded, and read in memory."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.request = replace(settings.request, held=Held())
        self.packed: tuple | None = None  # what `context` was packed from
        self.context: Context | None = None

    def record(self, task: Task) -> dict:
        """The task's line of the output; what went wrong is in it."""
        result: dict = {"schema_version": SCHEMA_VERSION}
        failed = task.failed
        try:
            if not failed:
                reply = self.answer(task)
                result = reply.to_json()
                if self.settings.reproducible:
                    del result["timings"], result["peak_memory_bytes"], result["usage"]["cached_tokens"]
                if task.recipe:
                    reply.require()
        except Exception as error:
            failed = describe(error)
        return {"id": task.job.id} | result | (error_of(*failed) if failed else {})

    def answer(self, task: Task) -> Answer:
        context = self.pack(task)
        if task.recipe:
            reply = run_recipe(self.checkpoint, task.recipe, context, self.request, silent, self.settings.explicit)
        else:
            reply = self.reply(context, task.job)
        if reply.finish_reason == "interrupted":
            raise KeyboardInterrupt
        return reply

    def reply(self, context: "Context", job: Job) -> Answer:
        request = replace(self.request, schema=None if job.schema is None else parse_schema(job.schema))
        if self.settings.packing.overflow != "shard":
            return answer(self.checkpoint, context, job.question, request, silent)
        room = room_beside(self.checkpoint, job.question, request, self.settings.packing)
        (reply,) = ask_about(self.checkpoint, context, [job.question], request, room, silent)
        return reply

    def pack(self, task: Task) -> "Context":
        """The task's context: that of the task before, where the question cannot make a difference."""
        settings = self.settings
        packing = task.recipe.packed(settings.packing, settings.explicit) if task.recipe else settings.packing
        fitted = (task.job.question, task.recipe) if packing.overflow in ("outline", "drop") else None
        wanted = (task.documents, packing, fitted)
        if self.context is None or self.packed != wanted:
            sources = task.documents, task.skips, self.checkpoint
            if task.recipe:
                context = pack_for(task.recipe, *sources, self.request, packing, settings.explicit)
            else:
                context = pack(*sources, task.job.question, self.request, packing)
            if self.context is None or self.context.ids != context.ids:
                self.request.held.drop()
            self.packed, self.context = wanted, context
        return self.context


def error_of(message: str, exit_code: int) -> dict:
    return {"error": {"message": message, "exit_code": exit_code}}


def recipe_text(name: str) -> str:
    """What the recipe says, "" if there is none of that name."""
    try:
        return find_recipe(name).read_text("utf-8", errors="replace")
    except (InputError, OSError):
        return ""


Engine = Callable[[Sequence[Sequence[Job]]], Iterator[tuple[Job, dict]]]


def local_engine(checkpoint: Checkpoint, settings: Settings) -> Engine:
    """Jobs in this process, one after the other."""

    def run(grouped: Sequence[Sequence[Job]]) -> Iterator[tuple[Job, dict]]:
        reader, worker = Reader(settings), Worker(checkpoint, settings)
        for group in grouped:
            for job in group:
                yield job, worker.record(reader.task(job))

    return run


def run_batch(jobs: Sequence[Job], engine: Engine, records: RecordStream | RecordFile, keep_going: bool) -> None:
    """Have the engine run the jobs without a record. BatchError if some failed, at the first one if not keep_going."""
    grouped = groups(jobs, records.done)
    left = sum(map(len, grouped))
    before, done, failures = len(jobs) - left, 0, []
    if before:
        say(f"nsa: {before:,} of {len(jobs):,} jobs are answered already")
    try:
        with progress("jobs", len(jobs), "jobs") as advance:
            for job, record in engine(grouped):
                records.add(job.key, record)
                done += 1
                advance(before + done, len(jobs))
                if "error" in record:
                    failures.append(f"{job.key}: {record['error']['message']}")
                    if not keep_going:
                        break
    finally:
        if records.resumable and done < left:
            say(f"nsa: {left - done:,} of {len(jobs):,} jobs are left; the same command goes on with them")
    if failures:
        raise BatchError(f"{len(failures):,} of {len(jobs):,} jobs failed; the first, {failures[0]}")
