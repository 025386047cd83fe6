"""Where a batch's records go: to a file that a killed run goes on from, or to a stream."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from nsa_cli.output import emit, write_atomically
from nsa_models.errors import InputError

START = b'{"id": '  # of every record


def encode(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"


class RecordStream:
    """Records to `write` in the order of `keys`: one that comes earlier waits for those before it."""

    resumable = False

    def __init__(self, keys: Iterable[str], write: Callable[[str], object] = emit) -> None:
        self.keys, self.write = list(keys), write
        self.waiting: dict[str, bytes] = {}
        self.done: frozenset[str] = frozenset()  # nothing is known of earlier runs

    def add(self, key: str, record: dict) -> None:
        self.waiting[key] = encode(record)
        while self.keys and self.keys[0] in self.waiting:
            self.write(self.waiting.pop(self.keys.pop(0)).decode())

    def close(self) -> None:
        """Write what waits for records that will not come."""
        for key in self.keys:
            if key in self.waiting:
                self.write(self.waiting.pop(key).decode())


class RecordFile:
    """Records in a file: each is appended as it ends, and `close` puts them into the order of `keys` in one step.

    The file is all that there is: a run that was killed at any time leaves whole records and at most one torn line.
    The next run keeps the answers (`done`), and drops errors, whose jobs are tried again, and the torn line.
    """

    resumable = True

    def __init__(self, path: Path, digests: dict[str, str], anew: bool = False) -> None:
        """digests: key -> the `job` of its record, in the order of the jobs. anew: keep nothing.

        Raises InputError if the file holds something else, answers to other jobs, or is being written by another run.
        """
        self.path, self.keys = Path(os.path.realpath(path)), list(digests)
        self.file = lock(self.path)
        try:
            found = self.file.read()
            self.lines = {} if anew else kept(found, self.path, digests)
            self.done = frozenset(self.lines)
            if found != b"".join(self.lines.values()):
                write_atomically(self.path, b"".join(self.lines.values()))
                old, self.file = self.file, lock(self.path)
                old.close()
            self.file.seek(0, os.SEEK_END)
        except BaseException:
            self.file.close()
            raise

    def add(self, key: str, record: dict) -> None:
        self.lines[key] = encode(record)
        self.file.write(self.lines[key])
        self.file.flush()

    def close(self) -> None:
        try:
            ordered = b"".join(self.lines[key] for key in self.keys if key in self.lines)
            if ordered != b"".join(self.lines.values()):
                write_atomically(self.path, ordered)
        finally:
            self.file.close()


def lock(path: Path):
    """The file, made if need be, open for reading and writing at its start, by one process at a time."""
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 (the caller closes it)
    with suppress(ImportError):  # where there is no such lock, two runs are not kept apart
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(f"{path}: another nsa batch is writing to it") from None
    return file


def kept(found: bytes, path: Path, digests: dict[str, str]) -> dict[str, bytes]:
    """The answers in `found`, a file's content, by key."""
    advice = "name another file, or --restart to overwrite it"
    *whole, torn = found.split(b"\n")
    if torn and not (torn.startswith(START) or START.startswith(torn)):
        raise InputError(f"{path} holds no records; {advice}")
    lines = {}
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            key, failed = json.dumps(record["id"]), "error" in record
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} line {number} is no record; {advice}") from None
        if failed:
            continue
        if key not in digests:
            raise InputError(f"{path} answers a job {key} that is not here; {advice}")
        if record.get("job") != digests[key]:
            raise InputError(
                f"{path} answers another version of job {key}: its question, the options or the model have changed; "
                + advice
            )
        lines[key] = line + b"\n"
    return lines
