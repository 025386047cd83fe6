"""The jobs of a batch: JSON lines -> questions about documents, and which of them go together."""

import difflib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from nsa_models.errors import InputError

KEYS = ("id", "paths", "text", "question", "schema", "recipe", "params")


@dataclass(frozen=True)
class Job:
    """One line of the input. problem: why it cannot be run, or empty."""

    line: int  # from 1
    id: str | int | None = None
    paths: tuple[str, ...] = ()
    text: str | None = None
    question: str | None = None
    schema: str | dict | None = None  # of the answer: JSON schema, or its short form
    recipe: str | None = None
    params: Mapping[str, object] = field(default_factory=dict)
    problem: str = ""

    @property
    def key(self) -> str:
        """What its record is found by."""
        return json.dumps(self.id) if self.id is not None else f"line {self.line}"

    @property
    def document(self) -> tuple:
        return self.paths, self.text


def parse_jobs(data: bytes) -> list[Job]:
    """One job a line, empty lines aside; what is wrong with a line is in its job. InputError if two share an id."""
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    jobs = [parse_job(number, line) for number, line in lines if line.strip()]
    if not jobs:
        raise InputError('no jobs; one a line, such as {"id": 1, "paths": ["src"], "question": "what does it do?"}')
    first: dict[str, int] = {}
    for job in jobs:
        if first.setdefault(job.key, job.line) != job.line:
            raise InputError(f"line {job.line}: id {job.key} is that of line {first[job.key]}; ids must differ")
    return jobs


def parse_job(number: int, line: bytes) -> Job:
    try:
        value = json.loads(line.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        return Job(number, problem=f"line {number}: not JSON: {error}")
    if not isinstance(value, dict):
        return Job(number, problem=f"line {number}: not a JSON object")
    id = value.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int):
        return Job(number, problem=f"line {number}: it needs an id, a string or a whole number")
    problem = mistake(value)
    if problem:
        return Job(number, id, problem=f"line {number}: {problem}")
    known = {key: value[key] for key in KEYS if value.get(key) is not None}
    return Job(number, **known | {"paths": tuple(value.get("paths") or ())})


def mistake(value: dict) -> str:
    """What is wrong with a job's keys and values, or an empty string."""
    for key in value:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KEYS)}")
    given = {key for key in KEYS if value.get(key) is not None}
    for one, other in (("paths", "text"), ("question", "recipe")):
        if (one in given) == (other in given):
            return f"it needs either {one!r} or {other!r}"
    paths = value.get("paths", ["."])
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        return "'paths' must be a list of paths"
    if "-" in paths:
        return "'-' (standard input) is no path here; give the text as 'text'"
    for key in ("text", "question", "recipe"):
        if key in given and not (isinstance(value[key], str) and value[key].strip()):
            return f"{key!r} must be a string that is not empty"
    if "schema" in given and ("question" not in given or not isinstance(value["schema"], str | dict)):
        return "'schema' must be a JSON schema or its short form, beside a 'question'"
    if "params" in given and ("recipe" not in given or not isinstance(value["params"], dict)):
        return "'params' must be an object, beside a 'recipe'"
    return ""


def groups(jobs: Sequence[Job], done: Container[str] = ()) -> list[list[Job]]:
    """Jobs about the same document together, both in the order of the input; without those whose key is `done`, so that
    a run that goes on keeps to the order of the one that was stopped.
    """
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.document, []).append(job)
    left = ([job for job in group if job.key not in done] for group in found.values())
    return [group for group in left if group]
