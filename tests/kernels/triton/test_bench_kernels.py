"""`nsa bench kernels` in the interpreter: it runs to its end, its records are consistent, and its gate closes."""

import json
from pathlib import Path

import pytest
import torch

from nsa_cli.cli import run as nsa
from nsa_cli.kernel_bench import keys_touched
from nsa_cli.kernel_cases import Case, Shape, cases, prefill_inputs
from nsa_cli.kernel_check import Check, places
from nsa_cli.kernel_goals import GOALS, PARTS, part_cases
from nsa_kernels import Variant
from nsa_models.errors import CheckError

BENCH = ["bench", "kernels", "--device", "interpreter", "--variant", "8,4,16,3,12"]
TINY = [*BENCH, "--lengths", "60", "--shape", "3x1x16", "--batches", "1,2"]
SMALL = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=3, window=12)


def records(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_kind_of_case_is_checked_and_timed(capsys) -> None:
    assert nsa(TINY) == 0
    forward, backward, one, two, ragged = found = records(capsys)
    assert [r["case"] for r in found] == [
        "forward-60-3x1x16", "backward-60-3x1x16", "decode-b1-60-3x1x16", "decode-b2-60-3x1x16", "ragged-b2-60-3x1x16",
    ]  # fmt: skip
    assert forward["check"]["o"]["error"] <= 2 * forward["check"]["o"]["torch_error"] + 1e-6
    gradients = {"dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgates"}
    assert set(backward["check"]["whole"]) == set(backward["check"]["parts"]) == gradients
    assert set(ragged["check"]) == {"o", "importance_missed", "dense"}
    for record in found:
        ms = record["ms"]
        assert record["ms_per_query_head"] == pytest.approx(ms["nsa"] / 3)
        for name, speedup in record["speedup"].items():
            assert speedup == pytest.approx(ms[name] / ms["nsa"])
    assert set(forward["ms"]) == {"nsa", "triton_dense", "sdpa_math"} and set(ragged["ms"]) == {"nsa", "triton_dense"}
    # 60 tokens: 14 compressed, 48 selected, 12 window rows of one key head, 32 wide with their values, 4 bytes each;
    # the ragged sequences have 30 and 59
    for record, rows in ((one, 74), (two, 148), (ragged, 6 + 30 + 12 + 13 + 48 + 12)):
        assert record["gb_per_s"] == pytest.approx(rows * 32 * 4 / record["ms"]["nsa"] / 1e6)
        assert record["share"] == pytest.approx(record["gb_per_s"] / record["copy_gb_per_s"])


def test_a_check_alone_times_nothing(capsys) -> None:
    """At lengths where there is no compressed block yet, or every block is selected."""
    tiny = ["--lengths", "1,30", "--shape", "2x2x16/8", "--batches", "1"]
    assert nsa([*BENCH, *tiny, "--check", "--case", "forward", "--case", "decode-b1-1-"]) == 0
    found = records(capsys)
    assert [r["kind"] for r in found] == ["forward", "decode", "forward"]
    assert all("check" in record and "ms" not in record for record in found)


def test_a_wrong_kernel_fails_its_check_and_the_others_go_on(capsys, monkeypatch) -> None:
    from nsa_kernels import gpu

    right = gpu.nsa_attention

    def wrong(*args, **kwargs):
        o, chosen = right(*args, **kwargs)
        return o * 1.001, chosen

    monkeypatch.setattr(gpu, "nsa_attention", wrong)
    assert nsa([*TINY, "--case", "forward-60", "--case", "decode-b1"]) == 6
    captured = capsys.readouterr()
    assert "1 of 2 cases failed: forward-60-3x1x16" in captured.err
    forward, decode = (json.loads(line) for line in captured.out.splitlines())
    assert forward["failed"].startswith("o is off by") and "ms" not in forward
    assert "ms" in decode


def test_a_kernel_that_does_not_launch_is_a_record(capsys, monkeypatch) -> None:
    from nsa_kernels import gpu

    def broken(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gpu, "nsa_attention", broken)
    assert nsa([*TINY, "--case", "forward-60"]) == 6
    assert records(capsys)[0]["failed"] == "RuntimeError: out of resource: shared memory"


class TestCheck:
    """What no right kernel does is found."""

    check = Check(torch.device("cpu"), torch.float32, SMALL)
    case = cases([100], [Shape.parse("6x2x16")], [1])[0]

    def inputs(self) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Of the last queries, with the right output and blocks."""
        x = self.check.part(prefill_inputs(self.case, SMALL, "cpu", torch.float32), places(100, 16)[-1])
        exact = {n: t.double() for n, t in x.items()}
        best = self.check.equations(exact, torch.zeros(16, 2, 3, dtype=torch.int32))[2]
        return x, self.check.equations(exact, best)[0], best

    def test_the_right_result_passes(self) -> None:
        self.check.compare(*self.inputs())

    @pytest.mark.parametrize("change", ["none", "again", "unforced", "worse"])
    def test_other_blocks(self, change: str) -> None:
        x, _, blocks = self.inputs()
        current = torch.arange(84, 100)[:, None] // 16  # of 7 blocks: the first, the last two, none left to choose
        if change == "none":
            blocks[0, 0, -1] = -1
        elif change == "again":
            blocks[0, 0, 0] = blocks[0, 0, 1]
        elif change == "unforced":
            blocks[..., 0] = 1
        else:
            blocks = torch.stack([torch.zeros_like(current), 1 + 0 * current, current], -1).int().expand(-1, 2, -1)
        with pytest.raises(CheckError, match="block"):
            self.check.compare(x, self.check.equations({n: t.double() for n, t in x.items()}, blocks)[0], blocks)

    def test_what_is_not_written(self) -> None:
        x, o, blocks = self.inputs()
        o[3, 1, 2] = torch.nan
        with pytest.raises(CheckError, match="o is off"):
            self.check.compare(x, o, blocks)

    def test_a_choice_of_less_importance(self) -> None:
        check = Check(torch.device("cpu"), torch.float32, Variant(8, 4, 16, 4, window=12))
        importance = torch.tensor([[[1.0, 0.2, 0.3, 0.1, 1.0, 1.0]]])
        best, other = (torch.tensor([[[0, i, 4, 5]]], dtype=torch.int32) for i in (2, 1))
        assert check.missed_importance(importance, best, best) == 0
        with pytest.raises(CheckError, match="miss 0.1 of"):
            check.missed_importance(importance, best, other)


def test_places_cover_the_ends() -> None:
    assert places(100, 16) == [slice(0, 16), slice(42, 58), slice(84, 100)]
    assert places(48, 16) == [slice(0, 48)]


def test_keys_touched_are_the_visible_ones() -> None:
    assert [keys_touched(SMALL, t) for t in (1, 8, 90)] == [2, 17, 81]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert nsa(["bench", "kernels"]) == 1
    assert capsys.readouterr().err.startswith("nsa: no GPU was found")


@pytest.mark.parametrize("shape", ["64x4", "5x2x8", "axbxc", "4x2x0"])
def test_a_shape_that_is_none_is_a_usage_error(capsys, shape: str) -> None:
    assert nsa(["bench", "kernels", "--shape", shape]) == 2
    assert "write shapes as" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["32,16", "32,16,40,16,512", "a,b,c,d,e"])
def test_a_variant_that_is_none_is_a_usage_error(capsys, variant: str) -> None:
    assert nsa(["bench", "kernels", "--variant", variant]) == 2
    assert variant in capsys.readouterr().err


def test_cases_are_listed_and_two_pass_offsets_of_31_bits(capsys) -> None:
    assert nsa(["bench", "kernels", "--list", "--lengths", "100", "--shape", "9x3x64,64x4x128"]) == 0
    overflow = [name for name in capsys.readouterr().out.split() if name.startswith("overflow")]
    assert overflow == ["overflow-forward-263168-64x4x128", "overflow-backward-263168-64x4x128"]
    assert 263168 * 64 * 128 > 2**31


def forward(tokens: int, **ms: float | None) -> dict:
    case = Case("forward", tokens, Shape.parse("64x4x128"))
    about = {"case": case.name, "gpu": "H100", "torch": "2", "triton": "3", "check": {}}
    return about | {"ms": ms, "ms_per_query_head": ms["nsa"] / 64}


def test_goals_are_read_off_the_records(capsys, tmp_path) -> None:
    """The best dense attention of those there are; the later record counts; what failed or is not there says so."""
    first, again = (
        forward(65536, nsa=nsa, triton_dense=300.0, sdpa_flash=120.0, sdpa_cudnn=None) for nsa in (50.0, 20.0)
    )
    failed = forward(8192, nsa=1.0) | {"failed": "o is off"}
    model = {"machine": {"device": "H100", "torch": "2", "dtype": "bfloat16"}, "tokens": 128_000, "dense": None}
    model |= {"nsa": {"prefill": {"median": 80_000.0}, "decode": {"median": 450.4}}}
    for name, records in (("a", [first]), ("b", [again, failed, model])):
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records) + "\n")
    assert nsa(["bench", "goals", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    table, gpus, failure = capsys.readouterr().out.strip().split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[2] for row in rows[:5]] == ["15.0x", "6.0x", "20.0 ms", "not measured", "failed"]
    assert {row[2] for row in rows[5:-3]} == {"not measured"}
    assert [row[2] for row in rows[-3:]] == ["1.60 s", "not measured", "450 tokens/s, missed"]
    assert gpus == "H100, torch 2, triton 3; H100, torch 2" and failure == "forward-8192-64x4x128: o is off"


def test_goals_are_those_of_the_benchmarks(capsys) -> None:
    """Every row, whether measured or not, and every part is one that there is."""
    assert nsa(["bench", "goals"]) == 0
    page = (Path(__file__).parents[3] / "BENCHMARKS.md").read_text()
    shown = [line.split("|") for line in page.splitlines()]
    for line in capsys.readouterr().out.strip().splitlines():
        what = line.split("|")
        assert [1 for cells in shown if cells[:3] == what[:3] and cells[4:] == what[4:]], line
    assert {goal.part for goal in GOALS} <= {*PARTS, "model"}


def test_goals_of_what_is_no_record(capsys, tmp_path) -> None:
    (tmp_path / "x").write_text('{"case": "a", "gpu": "b", "torch": "2", "triton": "3"}\nTraceback\n')
    assert nsa(["bench", "goals", str(tmp_path / "x")]) == 3
    assert "x:2 is no record" in capsys.readouterr().err


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_there_in_small(part: str) -> None:
    """With the same kinds and groups, where size is not all that matters."""
    large, small = PARTS[part], part_cases(part, tiny=True)
    assert [(c.kind, c.shape.HQ // c.shape.HKV) for c in small] == [
        (c.kind, c.shape.HQ // c.shape.HKV) for c in large if not c.kind.startswith("overflow")
    ]
    assert all(c.tokens < 100 and c.shape.HKV == 1 for c in small)


def test_a_part_that_is_out_of_time_says_so(capsys) -> None:
    assert nsa([*BENCH, "--part", "decode", "--minutes", "0"]) == 0
    assert [record["skipped"] for record in records(capsys)] == ["out of time"] * 4
