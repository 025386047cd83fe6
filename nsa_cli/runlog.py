"""A log of runs, kept only where the user has asked for one: a JSON line a run, appended to a file of theirs."""

import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import click

from nsa_cli.output import warn


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
