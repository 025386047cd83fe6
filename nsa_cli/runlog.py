"""A log of runs, kept only where the user has asked for one: a JSON line a run, appended to a file of theirs."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import click

from nsa_cli.output import warn
from nsa_models.errors import InputError

KEYS = {"time": str, "arguments": list, "exit_code": int, "answers": list}  # what a line must hold to be a run


@dataclass
class RunLog:
    """One run's line; it travels in click's context. path: None = no log."""

    path: Path | None = None
    arguments: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    answers: list[dict] = field(default_factory=list)

    def write(self, exit_code: int) -> None:
        """Append the line. A log that cannot be written is a warning: the answer is out by now."""
        if self.path is None:
            return
        line = {
            "schema_version": 1,
            "time": datetime.fromtimestamp(self.started, timezone.utc).isoformat(timespec="seconds"),
            "directory": os.getcwd(),
            "arguments": self.arguments,
            "exit_code": exit_code,
            "seconds": round(time.time() - self.started, 3),
            "answers": self.answers,
        }
        data = json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb", buffering=0) as file:
                file.write(data)  # in one piece, so that runs at the same time do not mix
        except OSError as error:
            warn(f"the run log {self.path} cannot be written: {(error.strerror or str(error)).lower()}")


def log_answer(answer: dict) -> None:
    """Add an answer to the run's line, if there is to be one."""
    context = click.get_current_context(silent=True)
    log = context.find_root().meta.get(RunLog) if context else None
    if log:
        log.answers.append(answer)


def read_log(path: Path) -> Iterator[dict]:
    """Every run in the log, the oldest first; other lines are warned of. InputError if it cannot be read."""
    strange = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                run = _run(line)
                strange += run is None
                if run:
                    yield run
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if strange:
        warn(f"{path}: {strange:,} lines are no runs")


def _run(line: str) -> dict | None:
    try:
        run = json.loads(line)
        datetime.fromisoformat(run["time"])
        whole = all(isinstance(run[key], kind) for key, kind in KEYS.items())
        whole = whole and all(isinstance(word, str) for word in run["arguments"])
        return run if whole and all(isinstance(answer["answer"], str) for answer in run["answers"]) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def matches(run: dict, words: Sequence[str]) -> bool:
    """Whether every word is in the run's arguments or answers, in any case of letters."""
    text = "\n".join([*run["arguments"], *(answer["answer"] for answer in run["answers"])]).casefold()
    return all(word.casefold() in text for word in words)
