"""`nsa batch`: many questions about many documents, JSON lines in, JSON lines out."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click

from nsa_cli.batch import Engine, Settings, local_engine, run_batch
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.options import (
    answer_options,
    checkpoint_options,
    document_options,
    packing_options,
    verbosity_options,
)
from nsa_cli.commands.run import explicit
from nsa_cli.completion import complete_paths
from nsa_cli.jobs import parse_jobs
from nsa_cli.packing import Packing
from nsa_cli.records import RecordFile, RecordStream
from nsa_cli.request import Request
from nsa_models.errors import InputError


@click.command("batch")
@click.argument("jobs", metavar="JOBS|-", shell_complete=complete_paths)
@click.option("--output", "-o", metavar="FILE", help="Write records here, and go on from those that are here already.")
@click.option("--restart", is_flag=True, help="Keep nothing of the -o file; answer all jobs anew.")
@click.option("--keep-going/--fail-fast", default=True, show_default=True, help="What to do when a job fails.")
@click.option("--reproducible", is_flag=True, help="Leave timings and cached_tokens out: runs write the same bytes.")
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", help="Where: here, or on a Ray cluster."
)
@click.option("--address", metavar="HOST:PORT", help="The Ray cluster's. Default: start one on this machine.")
@click.option("--workers", type=click.IntRange(1), help="On the cluster. Default: one a GPU, or one a machine.")
@document_options
@packing_options
@answer_options
@checkpoint_options
@verbosity_options
def command(
    jobs, output, restart, keep_going, reproducible, engine, read, packing, request, checkpoint, **cluster
) -> None:
    """Answer the JOBS of a file, or of standard input (`-`): one JSON object a line in, one a line out.

    A job is {"id", "paths": [...] or "text", "question" with or without "schema", or "recipe" with "params"}. Its
    record is what `nsa ask --json` or `nsa run --json` prints, with the id; where that failed, "error" says why.

    Records come in the order of the jobs. Jobs about the same document are answered together, so that it is read
    once; with -o each record is in the file as soon as it ends, and in its place when all have.

    The same command goes on after a run that was stopped or killed: answers in the -o file are kept, errors are tried
    again. Exit code 7 if some jobs failed.

    With `--engine ray` (pip install 'nsa[ray]') the workers of a Ray cluster answer. nsa and the model must be
    installed on its machines; documents and recipes are read here. Jobs about the same document stay with one worker;
    the job of a worker that dies is tried again, three times at most. Where a cluster asks for a token, set
    RAY_AUTH_MODE=token, as for Ray itself.

    \b
      nsa batch jobs.jsonl -o answers.jsonl
      nsa batch jobs.jsonl -o answers.jsonl --max-tokens 200 --fail-fast
      nsa batch jobs.jsonl -o answers.jsonl --order importance --overflow drop --reserve 1k
      nsa batch jobs.jsonl -o answers.jsonl --engine ray --address auto
      echo '{"id": 1, "paths": ["bill.pdf"], "question": "Who is paid?", "schema": "name, amount float"}' | nsa batch -
      jq -c '{id: .n, paths: ["src"], question: .q}' questions.jsonl | nsa batch - | jq -r .answer
    """
    if engine == "local" and any(cluster.values()):
        raise click.UsageError("--address and --workers are for --engine ray")
    listed = parse_jobs(read_jobs(jobs, output))
    settings = Settings(read, request, reproducible, typed(request, packing), packing)
    digests = {job.key: settings.digest(job, checkpoint.identity) for job in listed}
    with open_records(output, digests, restart) as records:
        run_batch(listed, make_engine(engine, checkpoint, settings, **cluster), records, keep_going)


def make_engine(
    name: str, checkpoint: Checkpoint, settings: Settings, address: str | None, workers: int | None
) -> Engine:
    if name == "local":
        return local_engine(checkpoint, settings)
    from nsa_cli.cluster import ray_engine

    return ray_engine(checkpoint, settings, address, workers)


def typed(request: Request, packing: Packing) -> frozenset[str]:
    """The fields of both that are from the command line."""
    return frozenset(explicit() & {*vars(request), *vars(request.sampling), *vars(packing)})


@contextmanager
def open_records(output: str | None, digests: dict[str, str], restart: bool) -> Iterator[RecordStream | RecordFile]:
    """Records on stdout, in a file to go on from, or into what is no regular file (/dev/null, a named pipe)."""
    if output in (None, "-"):
        with closing(RecordStream(digests, sys.stdout)) as records:
            yield records
    elif os.path.exists(output) and not os.path.isfile(output):
        with (
            open(output, "w", encoding="utf-8") as stream,
            closing(RecordStream(digests, stream)) as records,
        ):
            yield records
    else:
        with closing(RecordFile(Path(output), digests, restart)) as records:
            yield records


def read_jobs(jobs: str, output: str | None) -> bytes:
    """The input's bytes. Raises InputError if it cannot be read, or if the output would go into it."""
    if jobs == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("no jobs: name a file, or pipe JSON lines in")
        return sys.stdin.buffer.read()
    try:
        data = Path(jobs).read_bytes()
        same = output not in (None, "-") and os.path.exists(output) and os.path.samefile(jobs, output)
    except OSError as error:
        raise InputError(f"{jobs}: {(error.strerror or str(error)).lower()}") from None
    if same or is_stdout(jobs):
        raise InputError(f"{jobs} would be overwritten by its own answers; name another output")
    return data


def is_stdout(path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # not a file
        return False
