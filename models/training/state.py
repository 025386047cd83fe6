"""The folder of a run: states that a kill cannot harm, metrics line by line, and which step they belong to."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from nsa_models.errors import NSAError

METRICS, PLOT, CHECKPOINT, DELTA = "metrics.jsonl", "loss.png", "checkpoint", "delta.safetensors"


class RunFolder:
    """`state-000050.pt` after 50 steps, the newest `keep` of them, and `metrics.jsonl`, a line a step."""

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path, self.keep = Path(path), keep

    def steps(self) -> list[int]:
        """Steps that have a state, in order."""
        found = (re.fullmatch(r"state-(\d+)\.pt", file.name) for file in self.path.glob("state-*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def file(self, step: int) -> Path:
        return self.path / f"state-{step:06d}.pt"

    def save(self, step: int, state: dict) -> None:
        """All or nothing: written beside its place, flushed to the disk, renamed; then older ones go."""
        target = self.file(step)
        staging = target.with_suffix(".new")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with staging.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staging, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            with suppress(OSError):
                staging.unlink()
            what = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise NSAError(f"{target}: cannot save the state ({what}); {self.last_good()}") from None
        for old in self.steps()[: -self.keep]:
            self.file(old).unlink()

    def load(self) -> tuple[int, dict] | None:
        """The newest state and its step, None where there is none. One that cannot be read is passed over."""
        for step in reversed(self.steps()):
            try:
                return step, torch.load(self.file(step), map_location="cpu", weights_only=True)
            except Exception:  # of any kind: what a half-written or foreign file holds is anybody's guess
                continue
        if self.steps():
            raise NSAError(f"{self.path}: no state in it can be read; remove the folder, or name another out")
        return None

    def last_good(self) -> str:
        steps = self.steps()
        return f"the last good state is that of step {steps[-1]:,}" if steps else "no state was saved yet"

    def log(self, record: dict) -> None:
        """Append one line to the metrics."""
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise NSAError(f"{self.path / METRICS}: {error.strerror}; {self.last_good()}") from None

    def records(self) -> list[dict]:
        """The metrics so far; a line cut off by a kill is left out."""
        file, records = self.path / METRICS, []
        for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def rewind(self, step: int) -> None:
        """Forget metrics of steps after the first `step`: they will be computed again."""
        kept = [record for record in self.records() if record["step"] <= step]
        if (self.path / METRICS).is_file():
            staging = self.path / (METRICS + ".new")
            staging.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
            os.replace(staging, self.path / METRICS)
