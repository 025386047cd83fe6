"""Jobs on a Ray cluster: as the local engine, on many machines. Documents are read here and sent to the workers."""

import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace

from nsa_cli.batch import Engine, Reader, Settings, Worker, error_of
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.jobs import Job
from nsa_cli.output import say
from nsa_models.errors import ModelError, NSAError

TRIES = 3  # of a job whose worker dies: it may have been the job that killed it


def ray_engine(checkpoint: Checkpoint, settings: Settings, address: str | None, workers: int | None) -> Engine:
    """address: of a running cluster; None = start one on this machine. workers: None = one a GPU, or one a machine.

    Jobs about the same document stay with one worker. A worker that dies is replaced and its job tried again.
    Raises NSAError without Ray, or if there is no cluster at `address`.
    """
    try:
        import ray
    except ImportError:
        raise NSAError("Ray is not installed; run: pip install 'nsa[ray]'") from None

    def run(grouped: Sequence[Sequence[Job]]) -> Iterator[tuple[Job, dict]]:
        if not grouped:
            return
        with redirect_stdout(sys.stderr):  # where Ray reports workers that died
            connect(address)
            try:
                yield from Cluster(checkpoint, settings, workers).run(grouped)
            finally:
                ray.shutdown()

    return run


def connect(address: str | None) -> None:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody
    check_reachable(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address, **quiet) if address else ray.init("local", include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        token = "" if not address or "RAY_AUTH_MODE" in os.environ else "; if it asks for a token: RAY_AUTH_MODE=token"
        raise NSAError(
            f"no Ray cluster at {address or 'this machine'}: {' '.join(str(error).split())}{token}"
        ) from None


def check_reachable(address: str | None) -> None:
    """Raise NSAError unless something listens at host:port; Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise NSAError(f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}") from None


class RemoteWorker:
    """A worker in a process of its own, which may be on another machine."""

    def __init__(self, checkpoint: tuple, fingerprint: str, settings: Settings) -> None:
        """checkpoint: what Checkpoint takes."""
        self.worker = Worker(Checkpoint(*checkpoint), settings)
        self.fingerprint = fingerprint

    def record(self, task, documents) -> dict:
        """task: without its documents, which come apart since many tasks share them. Raises ModelError where this
        machine's checkpoint is another one.
        """
        if self.worker.checkpoint.model.fingerprint != self.fingerprint:
            raise ModelError(f"{self.worker.checkpoint.directory} holds other weights on {os.uname().nodename}")
        return self.worker.record(replace(task, documents=documents))


class Seat:
    """A place for a worker, and the jobs about one document that wait for it."""

    def __init__(self, settings: Settings) -> None:
        self.worker = None
        self.jobs: deque[Job] = deque()
        self.tries = 0  # of the first of `jobs`
        self.reader = Reader(settings)
        self.sent = None  # the documents that `reference` stands for
        self.reference = None


class Cluster:
    def __init__(self, checkpoint: Checkpoint, settings: Settings, workers: int | None) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        gpus = 0 if checkpoint.device == "cpu" else int(gpus)
        count = workers or gpus or len(nodes)
        self.threads = checkpoint.threads or max(1, int(cpus // count))
        self.checkpoint, self.settings = checkpoint, settings
        share = min(self.threads, cpus / count)  # more than there are would wait for ever
        self.actor = ray.remote(num_cpus=share, num_gpus=gpus and min(1, gpus / count))(RemoteWorker)
        self.seats = [Seat(settings) for _ in range(count)]
        say(f"nsa: {count} workers, {self.threads} threads each, on {len(nodes)} machines")

    def run(self, grouped: Sequence[Sequence[Job]]) -> Iterator[tuple[Job, dict]]:
        import ray

        groups = deque(deque(group) for group in grouped)
        running: dict = {}  # reference of a record -> the seat that works on it

        def go_on(seat: Seat) -> None:
            if not seat.jobs and groups:
                seat.jobs = groups.popleft()
            if seat.jobs:
                running[self.submit(seat)] = seat

        for seat in self.seats:
            go_on(seat)
        while running:
            for reference in ray.wait(list(running), num_returns=1)[0]:
                seat = running.pop(reference)
                record = self.result(seat, reference)
                if record:
                    seat.tries = 0
                    yield seat.jobs.popleft(), record
                go_on(seat)

    def submit(self, seat: Seat):
        """Have the seat's worker, made if need be, answer the first of its jobs."""
        import ray

        if seat.worker is None:
            c = self.checkpoint
            model = str(c.requested) if c.requested and not os.path.exists(c.requested) else str(c.directory.resolve())
            asked = model, c.device, self.threads, c.dtype, c.template
            seat.worker = self.actor.remote(asked, c.model.fingerprint, self.settings)
        task = seat.reader.task(seat.jobs[0])
        if seat.reference is None or seat.sent is not task.documents:
            seat.sent, seat.reference = task.documents, ray.put(task.documents)
        return seat.worker.record.remote(replace(task, documents=()), seat.reference)

    def result(self, seat: Seat, reference) -> dict | None:
        """The record of the seat's first job; None if its worker died and the job is to be tried again."""
        import ray

        try:
            return ray.get(reference)
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError):
            seat.worker, seat.tries, job = None, seat.tries + 1, seat.jobs[0]
            seat.reference = None
            say(f"nsa: a worker died at job {job.key}, try {seat.tries} of {TRIES}")
            if seat.tries < TRIES:
                return None
            return {"id": job.id, "schema_version": 1} | error_of(f"{TRIES} workers died while answering it", 1)
        except ray.exceptions.RayTaskError as error:  # Worker.record puts into a record what a job can cause
            cause = error.as_instanceof_cause()
            raise NSAError(str(cause.cause if isinstance(cause.cause, NSAError) else cause.cause)) from None
