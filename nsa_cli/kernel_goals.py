"""What is to be reached on one GPU: the parts in which it is measured, of ten minutes at most, and the table of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nsa_cli.kernel_cases import OFFSETS, Case, Shape
from nsa_models.errors import CheckError

PAPER, WIDE, SMALL = (Shape.parse(text) for text in ("64x4x128", "64x4x192/128", "9x3x64"))
GROUPS = [PAPER, *(Shape.parse(text) for text in ("64x64x128", "64x32x128", "63x21x128", "63x9x128"))]  # 16, 1, 2, 3, 7
SHORT, LONG, LONGEST = 8 * 1024, 64 * 1024, 128 * 1024
BEYOND = OFFSETS // (PAPER.HQ * PAPER.D) + 1024  # tokens, whose offsets pass 2^31

PARTS = {
    "forward": [Case("forward", T, shape) for shape in (PAPER, WIDE) for T in (LONG, SHORT, LONGEST)],
    "backward": [Case("backward", T, PAPER) for T in (LONG, SHORT)],
    "decode": [Case("decode", LONG, PAPER, batch) for batch in (16, 64, 1)] + [Case("ragged", LONG, PAPER, 16)],
    "groups-forward": [Case("forward", LONG, shape) for shape in GROUPS],
    "groups-backward": [Case("backward", LONG, shape) for shape in GROUPS],
    "small": [Case(kind, SHORT, SMALL) for kind in ("forward", "backward")] + [Case("decode", SHORT, SMALL, 1)],
    "overflow": [Case(f"overflow-{kind}", BEYOND, PAPER) for kind in ("forward", "backward")],
}


def part_cases(name: str, tiny: bool) -> list[Case]:
    """tiny: some tokens, one key head and a fraction of its width, to try a part without a GPU; nothing where only the
    size is of interest.
    """
    if not tiny:
        return PARTS[name]
    small = {
        case: Shape(case.shape.HQ // case.shape.HKV, 1, case.shape.D // 8, case.shape.Dv // 8) for case in PARTS[name]
    }
    return [
        Case(case.kind, 20 + case.tokens // 2048, small[case], case.batch and min(case.batch, 2))
        for case in PARTS[name]
        if not case.kind.startswith("overflow")
    ]


@dataclass(frozen=True)
class Goal:
    what: str
    bound: float
    shown: str  # format of a value
    part: str  # or "model": `nsa bench`
    value: Callable[[dict[str, dict]], float]  # of records by case; KeyError where one is missing
    most: bool = False  # the value is to be at most the bound

    def row(self, records: dict[str, dict]) -> str:
        return f"| {self.what} | {self.shown.format(self.bound)} | {self.measured(records)} | {self.part} |"

    def measured(self, records: dict[str, dict]) -> str:
        try:
            value = self.value(records)
        except CheckError:
            return "failed"
        except (KeyError, TypeError):  # not in the run, skipped, or without dense attention
            return "not measured"
        reached = value <= self.bound if self.most else value >= self.bound
        return self.shown.format(value) + ("" if reached else ", missed")


def _measured(records: dict[str, dict], case: Case) -> dict:
    """Raises CheckError for a case that failed, KeyError for one that is not there."""
    if "failed" in records[case.name]:
        raise CheckError(records[case.name]["failed"])
    return records[case.name]


def _over(kind: str, tokens: int, shape: Shape, batch: int | None = None, dense: str | None = None):
    """How many times as fast as the named dense attention, or the best, NSA was."""

    def value(records: dict[str, dict]) -> float:
        ms = _measured(records, Case(kind, tokens, shape, batch))["ms"]
        found = {name: t for name, t in ms.items() if name != "nsa" and t is not None}
        return (found[dense] if dense else min(found.values())) / ms["nsa"]

    return value


def _ms(kind: str, tokens: int, shape: Shape):
    return lambda records: _measured(records, Case(kind, tokens, shape))["ms"]["nsa"]


def _group_cost(kind: str, shape: Shape):
    """Of a query head, over that with groups of 16."""

    def value(records: dict[str, dict]) -> float:
        own, paper = (_measured(records, Case(kind, LONG, s))["ms_per_query_head"] for s in (shape, PAPER))
        return own / paper

    return value


def _right(records: dict[str, dict]) -> float:
    return sum(bool(_measured(records, case)["check"]) for case in PARTS["overflow"])


def _model(value: Callable[[dict], float]) -> Callable[[dict[str, dict]], float]:
    return lambda records: value(records["model"])


def _prefill(shape: Shape, heads: str) -> list[Goal]:
    at = f"forward, {heads}"
    return [
        Goal(f"{at}, 64k tokens, over the dense Triton kernel", 9, "{:.1f}x", "forward",
             _over("forward", LONG, shape, dense="triton_dense")),
        Goal(f"{at}, 64k tokens, over the best dense one", 4, "{:.1f}x", "forward", _over("forward", LONG, shape)),
        Goal(f"{at}, 64k tokens, in all", 25, "{:.1f} ms", "forward", _ms("forward", LONG, shape), True),
        Goal(f"{at}, 128k tokens, in all", 75, "{:.1f} ms", "forward", _ms("forward", LONGEST, shape), True),
        Goal(f"{at}, 8k tokens, over the best dense one", 1, "{:.1f}x", "forward", _over("forward", SHORT, shape)),
    ]  # fmt: skip


GOALS = [
    *_prefill(PAPER, "64 query and 4 key heads of 128"),
    *_prefill(WIDE, "keys of 192, values of 128"),
    Goal("backward, 64k tokens, over the dense Triton kernel", 6, "{:.1f}x", "backward",
         _over("backward", LONG, PAPER, dense="triton_dense")),
    Goal("backward, 64k tokens, in all", 60, "{:.1f} ms", "backward", _ms("backward", LONG, PAPER), True),
    *(Goal(f"decode step, 64k tokens, batch of {batch}, over the best dense one", 11.6, "{:.1f}x", "decode",
           _over("decode", LONG, PAPER, batch)) for batch in (16, 64)),
    *(Goal(f"decode step, batch of {batch}, memory rate on the bytes it must read", 0.7, "{:.0%}", "decode",
           lambda records, batch=batch: _measured(records, Case("decode", LONG, PAPER, batch))["share"])
      for batch in (16, 64)),
    *(Goal(f"{kind}, group of {shape.HQ // shape.HKV}, per query head over that of 16", 1.5, "{:.2f}x",
           f"groups-{kind}", _group_cost(kind, shape), True)
      for kind in ("forward", "backward") for shape in GROUPS[1:]),
    Goal("offsets beyond 2^31, cases that are right", 2, "{:.0f}", "overflow", _right),
    Goal("built-in model, prefill of 128k tokens", 2, "{:.2f} s", "model",
         _model(lambda r: r["tokens"] / r["nsa"]["prefill"]["median"]), True),
    Goal("the same over dense attention", 9, "{:.1f}x", "model",
         _model(lambda r: r["nsa"]["prefill"]["median"] / r["dense"]["prefill"]["median"])),
    Goal("built-in model, decode at 128k tokens", 500, "{:.0f} tokens/s", "model",
         _model(lambda r: r["nsa"]["decode"]["median"])),
]  # fmt: skip

HEADER = "| what (bfloat16, medians) | to reach | measured | part |\n|---|---:|---:|---|"


def table(records: Iterable[dict]) -> str:
    """BENCHMARKS.md's, of records of `nsa bench kernels` and `nsa bench --json`; of two of a case the later counts."""
    found: dict[str, dict] = {}
    gpus: dict[str, None] = {}  # in their order
    for record in records:
        if "case" in record:
            found[record["case"]] = record
            gpus[f"{record['gpu']}, torch {record['torch']}, triton {record['triton']}"] = None
        elif record.get("machine", {}).get("dtype") == "bfloat16" and record["tokens"] == 128_000:
            found["model"] = record
            gpus[f"{record['machine']['device']}, torch {record['machine']['torch']}"] = None
    failed = [f"{name}: {record['failed']}" for name, record in found.items() if "failed" in record]
    rows = "\n".join(goal.row(found) for goal in GOALS)
    return "\n\n".join(filter(None, [f"{HEADER}\n{rows}", "; ".join(gpus), *failed]))
