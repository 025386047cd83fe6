"""Jobs -> records: grouped by document, answered one after the other, what went wrong in a record of its own."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from nsa_cli.answer import SCHEMA_VERSION, Answer, Request, answer, silent
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.documents import Document, ReadOptions, Skip, read_documents
from nsa_cli.held import Held
from nsa_cli.jobs import Job, groups
from nsa_cli.output import describe, progress, say, say_skipped
from nsa_cli.recipe import find_recipe, load_recipe
from nsa_cli.records import RecordFile, RecordStream
from nsa_cli.steps import run_recipe
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
    explicit: frozenset[str] = frozenset()  # options that were typed: in them a recipe does not decide

    def digest(self, job: Job, model: str) -> str:
        """12 hex digits of what an answer depends on: the job, these settings and the model (its fingerprint)."""
        about = [asdict(replace(job, line=0, id=None)), asdict(replace(self.request, held=None)), asdict(self.read)]
        about += [self.reproducible, sorted(self.explicit), model, recipe_text(job.recipe) if job.recipe else ""]
        text = json.dumps(about, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]


class Worker:
    """Answers jobs with one checkpoint. Jobs about one document, one after the other, have it read once."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.request = replace(settings.request, held=Held())
        self.document: tuple | None = None
        self.context: Context | None = None

    def record(self, job: Job) -> dict:
        """The job's line of the output; what went wrong is in it."""
        result: dict = {"schema_version": SCHEMA_VERSION}
        try:
            reply = self.answer(job)
            result = reply.to_json()
            if self.settings.reproducible:
                del result["timings"], result["usage"]["cached_tokens"]
            if job.recipe:
                reply.require()
        except Exception as error:
            message, code = describe(error)
            result["error"] = {"message": message, "exit_code": code}
        return {"id": job.id, **result, "job": self.settings.digest(job, self.checkpoint.model.fingerprint)}

    def answer(self, job: Job) -> Answer:
        if job.problem:
            raise InputError(job.problem)
        if job.recipe:
            recipe = load_recipe(job.recipe).bind(job.params)
            context = self.read(job, recipe.read_options(self.settings.read))
            reply = run_recipe(self.checkpoint, recipe, context, self.request, silent, self.settings.explicit)
        else:
            reply = answer(self.checkpoint, self.read(job, self.settings.read), job.question, self.request, silent)
        if reply.finish_reason == "interrupted":
            raise KeyboardInterrupt
        return reply

    def read(self, job: Job, options: ReadOptions) -> "Context":
        """The job's document, if it is not that of the job before."""
        from nsa_cli.context import build_context

        if self.document != (job.document, options):
            self.document = self.context = None
            self.request.held.drop()
            documents, skips = documents_of(job, options)
            self.context = build_context(documents, self.checkpoint.tokenizer, skips)
            self.document = job.document, options
        return self.context


def documents_of(job: Job, options: ReadOptions) -> tuple[list[Document], list[Skip]]:
    if job.text is not None:
        return [Document(TEXT, job.text)], []
    documents, skips = read_documents(job.paths, options)
    say_skipped(skips)
    return documents, skips


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
        worker = Worker(checkpoint, settings)
        for group in grouped:
            for job in group:
                yield job, worker.record(job)

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
