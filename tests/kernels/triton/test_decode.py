"""The Triton decode step, in the interpreter: for every sequence the last row of the reference's prefill in float64."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.decode import decode_attention, decode_dense
from nsa_kernels.variant import Variant

SMALL = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=4, window=24)
VARIANTS = {
    "small": SMALL,
    "paper": Variant(),
    "literal": Variant(8, 4, 16, 4, window=20, importance_map="literal"),
    "no window": Variant(8, 8, 8, 3, initial_blocks=0, local_blocks=1, window=0),
    "streamed": Variant(16, 16, 16, 4, 0, 1, window=16, topk="streamed", topk_chunk=4),
    "wide overlap": Variant(16, 4, 12, 5, window=7),
}
LENGTHS = [1, 7, 8, 64, 0, 150]  # no block yet, one token before the first, the first, a whole number, none, many


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty starts as NaN: what no program writes stays NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Caches of B sequences, NaN behind each length, and what the reference makes of them in float64."""

    def __init__(self, variant, lengths, HKV=2, G=2, D=16, Dv=16, dtype=torch.float32, own=False, cut=0) -> None:
        B, capacity = len(lengths), max(lengths) + 13
        NC = variant.compressed_count(capacity)
        self.variant, self.lengths = variant, torch.tensor(lengths, dtype=torch.int32)
        self.q, self.gates = random(B, HKV * G, D, seed=1), random(B, HKV * G, 3, seed=2).sigmoid()
        self.k, self.v = random(B, HKV, capacity, D, seed=3), random(B, HKV, capacity, Dv, seed=4)
        self.k_cmp, self.v_cmp = random(B, HKV, NC, D, seed=5), random(B, HKV, NC, Dv, seed=6)
        self.own = {}
        if own:
            self.own["q_cmp"] = random(B, HKV * G, D, seed=7)
            self.own |= {"k_swa": random(B, HKV, capacity, D, seed=8), "v_swa": random(B, HKV, capacity, Dv, seed=9)}
        for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates"):
            setattr(self, name, getattr(self, name).to(dtype))
        self.own = {name: x.to(dtype) for name, x in self.own.items()}
        for b, length in enumerate(lengths):
            for x in (self.k, self.v, *(x for name, x in self.own.items() if name != "q_cmp")):
                x[b, :, length:] = float("nan")
            for x in (self.k_cmp, self.v_cmp):
                x[b, :, variant.compressed_count(length) :] = float("nan")

    def ours(self) -> tuple[Tensor, Tensor]:
        caches = self.k, self.v, self.k_cmp, self.v_cmp
        return decode_attention(self.q, *caches, self.gates, self.lengths, self.variant, **self.own)

    def expected(self, b: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        length = int(self.lengths[b])
        own = {
            n: x[b : b + 1].to(dtype) if n == "q_cmp" else x[b].transpose(0, 1).to(dtype) for n, x in self.own.items()
        }
        caches = (x[b].transpose(0, 1).to(dtype) for x in (self.k, self.v, self.k_cmp, self.v_cmp))
        o, blocks = reference.nsa_attention(
            self.q[b : b + 1].to(dtype),
            *caches,
            self.gates[b : b + 1].to(dtype),
            self.variant,
            offset=length - 1,
            **own,
        )
        return o[0], blocks[0]

    def check(self) -> None:
        o, blocks = self.ours()
        assert o.isfinite().all() and o.dtype == self.q.dtype
        for b, length in enumerate(self.lengths.tolist()):
            if length == 0:
                assert not o[b].any() and (blocks[b] == -1).all()
                continue
            (true, chosen), (theirs, _) = self.expected(b, torch.float64), self.expected(b, self.q.dtype)
            assert torch.equal(blocks[b], chosen), (b, length)
            allowed = 2 * float((theirs.double() - true).abs().max()) + 1e-6
            assert float((o[b].double() - true).abs().max()) <= allowed, (b, length)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_is_the_last_row_of_a_prefill(name: str) -> None:
    lengths = [1, 31, 32, 64, 0, 700] if name == "paper" else LENGTHS
    Case(VARIANTS[name], lengths, HKV=1 if name == "paper" else 2).check()


@pytest.mark.parametrize(
    "heads",
    [(1, 1, 32, 32), (2, 3, 64, 64), (1, 4, 40, 24), (1, 7, 16, 16), (1, 16, 32, 32), (1, 2, 192, 128)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_group_and_width(heads: tuple[int, ...], dtype: torch.dtype) -> None:
    Case(SMALL, [90, 5], *heads, dtype=dtype).check()


def test_branches_with_keys_of_their_own() -> None:
    Case(SMALL, LENGTHS, own=True).check()


def test_strided_caches() -> None:
    case = Case(SMALL, [70, 33])
    for name in ("k", "v", "k_cmp", "v_cmp"):
        setattr(case, name, getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2))
    case.check()


def test_no_compressed_block_fits_the_cache() -> None:
    Case(Variant(), [1, 3, 17]).check()


def test_candidates_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in contexts beyond 16k tokens, whose blocks no single program ranks."""
    monkeypatch.setattr("nsa_kernels.decode._chunks", lambda blocks, NP: (4, -(-blocks // 4)))
    Case(SMALL, [200, 64, 3]).check()
    Case(VARIANTS["streamed"], [200, 64, 3]).check()


@pytest.mark.parametrize("splits", [1, 3, 64])
def test_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_kernels.decode._programs", lambda q: splits)
    Case(SMALL, [150, 20]).check()


def test_equal_importance_takes_the_first_blocks() -> None:
    case = Case(SMALL, [160], HKV=1)
    case.k_cmp.zero_()
    assert case.ours()[1].tolist() == [[[0, 1, 8, 9]]]  # initial, the first of all equals, the two local ones


def test_dense_step_is_the_last_row_of_a_dense_prefill() -> None:
    case = Case(SMALL, LENGTHS, G=3, D=48, Dv=32)
    o = decode_dense(case.q, case.k, case.v, case.lengths)
    for b, length in enumerate(LENGTHS):
        k, v = (x[b, :, :length].transpose(0, 1).double() for x in (case.k, case.v))
        true = reference.dense_attention(case.q[b : b + 1].double(), k, v, offset=length - 1)[0] if length else 0 * o[b]
        assert float((o[b] - true).abs().max()) < 2e-6


def test_what_does_not_fit_is_refused() -> None:
    case = Case(SMALL, [20])
    with pytest.raises(ValueError, match="int32"):
        decode_dense(case.q, case.k, case.v, case.lengths.long())
    with pytest.raises(ValueError, match="do not fit"):
        decode_dense(case.q, case.k[..., :8], case.v, case.lengths)
    case.k_cmp = case.k_cmp[:, :1]
    with pytest.raises(ValueError, match="k_cmp"):
        case.ours()
