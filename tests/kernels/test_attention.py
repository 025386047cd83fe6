"""Invariants of NSA at odd sizes on every path (reference, torch operations, C); the fast ones against the truth."""

import ctypes
import platform
import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_kernels import Variant, compress, cpu, dense_attention, library, masked, native, nsa_attention, reference

PAPER = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=5, window=24)
VARIANTS = {
    "paper": PAPER,
    "literal-map": replace(PAPER, importance_map="literal"),
    "fla": Variant(16, 16, 16, 4, 1, 2, 32),
    "fla-old-streamed": Variant(16, 16, 16, 8, 0, 1, 32, topk="streamed", topk_chunk=8),
    "forced-only": Variant(8, 8, 16, 3, 1, 2, 7),
    "no-window": Variant(8, 8, 32, 4, 0, 1, 0),
    "wide-overlap": Variant(32, 8, 16, 6, 2, 1, 100),
    "half-panel": Variant(16, 16, 32, 6, 1, 3, 20),  # of the compiled code's 64 columns
    "three-quarters": Variant(16, 16, 48, 4, 1, 1, 30),
}
# T queries, S keys, HQ, HKV, D, Dv: group sizes 1, 2, 3, 7, 16; odd lengths; d_qk != d_v
SHAPES = {
    "G3": (203, 203, 6, 2, 16, 16),
    "G1-step": (1, 301, 2, 2, 60, 60),
    "G7-tail": (63, 257, 7, 1, 32, 20),
    "G16-few": (5, 111, 16, 1, 24, 8),
    "G2-first-token": (1, 1, 4, 2, 16, 16),
    "G2-no-block-yet": (6, 6, 4, 2, 16, 16),
}


def compiled() -> bool:
    return native.supports(torch.empty(1, 1, 2))


FAST = [
    pytest.param(cpu, id="cpu"),
    pytest.param(native, id="native", marks=pytest.mark.skipif(not compiled(), reason="no C compiler")),
]
PATHS = [pytest.param(reference, id="reference"), *FAST]
EQUAL = [*FAST, pytest.param(masked, id="masked")]


def tensors(shape: tuple, variant: Variant, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    T, S, HQ, HKV, D, Dv = shape
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((T, HQ, D), (S, HKV, D), (S, HKV, Dv)))
    gates = torch.rand(T, HQ, 3, generator=g, dtype=torch.float64)
    q, k, v, gates = (x.to(dtype) for x in (q, k, v, gates))
    return dict(
        q=q,
        k=k,
        v=v,
        k_cmp=reference.compress(k, variant),
        v_cmp=reference.compress(v, variant),
        gates=gates,
        variant=variant,
        offset=S - T,
    )


def double(inputs: dict) -> dict:
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def sdpa(inputs: dict, visible: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's own attention over the same queries and keys, dense and causal unless masked: (T, HQ, Dv)."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    T, HQ, _ = q.shape
    if visible is None:
        visible = torch.arange(k.shape[0]) <= inputs["offset"] + torch.arange(T)[:, None]
    k, v = (x.repeat_interleave(HQ // k.shape[1], 1).transpose(0, 1) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=visible)
    return o.transpose(0, 1)


@pytest.mark.parametrize("path", EQUAL)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_fast_equals_reference(path, variant: Variant, shape: tuple) -> None:
    inputs = tensors(shape, variant)
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = path.nsa_attention(**inputs)
    assert torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", ["all", "chosen"])
def test_error_at_most_twice_that_of_plain_pytorch(path, dtype: torch.dtype, keys: str) -> None:
    """Path and PyTorch compute one softmax, over all keys or over those of the chosen blocks; float64 judges."""
    if not runs(path, dtype):
        pytest.skip("no bfloat16 products on this machine")
    variant = replace(PAPER, select_count=40 if keys == "all" else 8)
    inputs = tensors((150, 333, 6, 2, 64, 64), variant, dtype)
    inputs["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=dtype).expand(150, 6, 3)
    o, blocks = path.nsa_attention(**inputs)
    if keys == "all":
        mask = torch.arange(333) <= 183 + torch.arange(150)[:, None]
    else:
        mask = tokens_of(blocks, 333, 16) & (torch.arange(333) <= 183 + torch.arange(150)[:, None])[:, None]
        mask = mask.repeat_interleave(3, 1).transpose(0, 1)  # (HQ, T, S)
    truth = sdpa(double(inputs), mask)
    ours, theirs = (o.double() - truth).abs(), (sdpa(inputs, mask).double() - truth).abs()
    assert ours.max() <= 2 * theirs.max()
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


def runs(path, dtype: torch.dtype) -> bool:
    return path is not native or native.supports(torch.empty(1, 1, 2, dtype=dtype))


def tokens_of(blocks: torch.Tensor, S: int, size: int) -> torch.Tensor:
    """block_indices (T, HKV, n) -> which of S tokens they hold: (T, HKV, S)."""
    held = torch.arange(S)[:, None] // size == blocks[:, :, None]  # (T, HKV, S, n)
    return held.any(-1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
class TestInvariants:
    SHAPE = (203, 203, 6, 2, 16, 16)

    def test_any_chunking_gives_the_same(self, path, variant: Variant) -> None:
        whole = tensors(self.SHAPE, variant)
        expected, blocks = path.nsa_attention(**whole)
        for start, stop in ((0, 1), (1, 38), (38, 101), (101, 102), (102, 203)):
            seen = variant.compressed_count(stop)
            piece = whole | dict(
                q=whole["q"][start:stop],
                gates=whole["gates"][start:stop],
                k=whole["k"][:stop],
                v=whole["v"][:stop],
                k_cmp=whole["k_cmp"][:seen],
                v_cmp=whole["v_cmp"][:seen],
                offset=start,
            )
            o, chosen = path.nsa_attention(**piece)
            torch.testing.assert_close(o, expected[start:stop], atol=3e-6, rtol=1e-5)
            assert torch.equal(chosen, blocks[start:stop])

    def test_later_tokens_change_nothing(self, path, variant: Variant) -> None:
        whole = tensors(self.SHAPE, variant)
        changed = dict(whole)
        for name in ("k", "v"):
            changed[name] = whole[name].clone()
            changed[name][101:] = torch.nan
        for name in ("k_cmp", "v_cmp"):
            changed[name] = whole[name].clone()
            changed[name][variant.compressed_count(101) :] = torch.nan
        changed["q"], changed["gates"] = whole["q"][:101], whole["gates"][:101]
        o, _ = path.nsa_attention(**changed)
        torch.testing.assert_close(o, path.nsa_attention(**whole)[0][:101], atol=3e-6, rtol=1e-5)

    def test_all_blocks_selected_is_dense_attention(self, path, variant: Variant) -> None:
        if variant.topk == "streamed":
            pytest.skip("the streamed top-k takes at most half of the blocks from the query's own chunk")
        inputs = tensors(self.SHAPE, replace(variant, select_count=20))
        inputs["gates"] = torch.tensor([0.0, 1.0, 0.0]).expand(203, 6, 3)
        torch.testing.assert_close(path.nsa_attention(**inputs)[0], sdpa(inputs), atol=3e-6, rtol=1e-5)

    def test_forced_blocks_are_chosen_and_nothing_ahead(self, path, variant: Variant) -> None:
        blocks = path.nsa_attention(**tensors(self.SHAPE, variant))[1].long()
        for t in range(203):
            current = t // variant.select_block
            forced = set(range(min(variant.initial_blocks, current + 1)))
            forced |= set(range(max(0, current - variant.local_blocks + 1), current + 1))
            for row in blocks[t].tolist():
                present = [j for j in row if j >= 0]
                assert forced <= set(present) and max(present) == current
                assert len(set(present)) == len(present)
                if variant.topk == "exact":
                    assert len(present) == min(variant.select_count, current + 1)


@pytest.mark.parametrize("path", EQUAL)
def test_own_keys_for_window_and_own_queries_for_compression(path) -> None:
    inputs = tensors((70, 130, 6, 2, 16, 24), PAPER)
    other = tensors((70, 130, 6, 2, 16, 24), PAPER, seed=1)
    inputs |= dict(q_cmp=other["q"], k_swa=other["k"], v_swa=other["v"])
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = path.nsa_attention(**inputs)
    assert torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("path", EQUAL)
@pytest.mark.parametrize("T", [1, 3, 9, 400])
def test_few_queries_of_a_long_context_and_many(path, T: int) -> None:
    """Few queries gather their own blocks, many share them; both over keys that no query of theirs wrote."""
    inputs = tensors((T, 2500, 3, 1, 16, 16), PAPER)
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = path.nsa_attention(**inputs)
    assert torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("path", EQUAL)
@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_any_softmax_scale(path, scale: float) -> None:
    inputs = tensors((40, 130, 6, 2, 16, 16), PAPER) | {"scale": scale}
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = path.nsa_attention(**inputs)
    assert torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("shape", [(70, 130, 4, 2, 60, 20), (33, 130, 4, 1, 192, 128), (1, 130, 4, 1, 256, 256)])
@pytest.mark.parametrize("names", [("k", "v", "k_cmp", "v_cmp"), ("k", "v"), ("k_cmp", "v_cmp"), ("v",)], ids="+".join)
def test_bfloat16_keys_are_read_as_they_are(path, shape: tuple, names: tuple) -> None:
    inputs = tensors(shape, PAPER)
    rounded = {name: inputs[name].bfloat16() for name in names}
    truth, blocks = reference.nsa_attention(**(double(inputs | rounded)))
    o, chosen = path.nsa_attention(**(inputs | rounded))
    assert torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("keys", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 130, 4, 2, 60, 20), (33, 130, 4, 1, 192, 128), (1, 77, 6, 2, 30, 6)])
def test_bfloat16_queries_at_odd_sizes(path, keys: torch.dtype, shape: tuple) -> None:
    if not runs(path, torch.bfloat16):
        pytest.skip("no bfloat16 products on this machine")
    inputs = tensors(shape, replace(PAPER, select_count=9), torch.bfloat16)  # every block: rounding chooses no other
    inputs |= {name: inputs[name].to(keys) for name in ("k", "v", "k_cmp", "v_cmp")}
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = path.nsa_attention(**inputs)
    assert o.dtype == torch.bfloat16 and torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_where_they_lie(path, dtype: torch.dtype) -> None:
    """The cache hands out (HKV, capacity, D) buffers cut and transposed; queries may be a slice of something wider."""
    inputs = tensors((70, 130, 6, 2, 32, 32), PAPER) | {"v": tensors((70, 130, 6, 2, 32, 32), PAPER, seed=3)["v"]}
    for name in ("k", "v", "k_cmp", "v_cmp"):
        inputs[name] = inputs[name].to(dtype)
    expected, blocks = path.nsa_attention(**inputs)
    views = dict(inputs)
    for name in ("k", "v", "k_cmp", "v_cmp"):
        x = inputs[name]
        buffer = torch.full((x.shape[1], x.shape[0] + 64, x.shape[2]), torch.nan, dtype=dtype)
        buffer[:, : x.shape[0]] = x.transpose(0, 1)
        views[name] = buffer[:, : x.shape[0]].transpose(0, 1)
        assert views[name].stride() != x.stride()
    for name in ("q", "gates"):
        x = inputs[name]
        views[name] = torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :]
    o, chosen = path.nsa_attention(**views)
    assert torch.equal(o, expected) and torch.equal(chosen, blocks)
    views["k"] = inputs["k"].transpose(1, 2).contiguous().transpose(1, 2)  # the last dimension is not contiguous
    torch.testing.assert_close(path.nsa_attention(**views)[0], expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("path", FAST)
def test_addresses_beyond_two_to_the_31(path) -> None:
    """Keys 2**25 elements apart: token 79 lies 5 GB behind token 0. Untouched pages of the buffer take no memory."""
    inputs = tensors((9, 80, 2, 1, 16, 16), PAPER)
    expected, _ = path.nsa_attention(**inputs)
    for name in ("k", "v"):
        x = inputs[name].bfloat16()
        inputs[name] = torch.empty(80, 1 << 25, dtype=torch.bfloat16)[:, None, :16]
        inputs[name].copy_(x)
    assert inputs["k"].stride(0) * 79 > 1 << 31
    o, _ = path.nsa_attention(**inputs)
    torch.testing.assert_close(o, expected, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_element_is_written(path, shape: tuple, poisoned) -> None:
    """New memory holds NaN: an element that is read before it is written shows."""
    inputs = tensors(shape, PAPER)
    assert torch.empty(3).isnan().all()
    o, chosen = path.nsa_attention(**inputs)
    assert ((chosen >= -1) & (chosen <= shape[1] // 16)).all()
    truth, _ = reference.nsa_attention(**double(inputs))
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


NATIVE_BF16 = pytest.mark.skipif(
    not native.supports(torch.empty(1, 1, 2, dtype=torch.bfloat16)), reason="no bfloat16 products on this machine"
)


class TestClosedGates:
    """A branch that no gate lets through is not computed: NaN in its values would show."""

    CLOSED = {torch.float32: 0.0, torch.bfloat16: 2.0**-20}

    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NATIVE_BF16)])
    @pytest.mark.parametrize("branch", [0, 2])
    @pytest.mark.skipif(not compiled(), reason="no C compiler")
    def test_its_values_are_not_read(self, branch: int, dtype: torch.dtype) -> None:
        inputs = tensors((203, 203, 6, 2, 16, 16), PAPER, dtype)
        inputs["k_swa"], inputs["v_swa"] = inputs["k"].clone(), inputs["v"].clone()
        inputs["gates"][..., branch] = self.CLOSED[dtype]
        expected, _ = reference.nsa_attention(**double(inputs))
        inputs["v_cmp" if branch == 0 else "v_swa"].fill_(torch.nan)
        o, _ = native.nsa_attention(**inputs)
        torch.testing.assert_close(o.double(), expected, atol=4e-6 if dtype == torch.float32 else 0.03, rtol=0.02)
        inputs["gates"][77, 4, branch] = 2 * self.CLOSED[dtype] or 1e-30  # one head lets it through
        o, _ = native.nsa_attention(**inputs)
        broken = o.isnan().any(2).any(1).nonzero().flatten().tolist()
        assert 77 in broken and len(broken) < 16  # of the compressed branch, all queries of a tile

    @pytest.mark.skipif(not compiled(), reason="no C compiler")
    @given(st.integers(0, 2**32))
    @settings(max_examples=20, deadline=None)
    def test_queries_with_open_and_closed_gates_mix(self, seed: int) -> None:
        inputs = tensors((90, 131, 6, 2, 16, 16), PAPER, seed=seed)
        closed = torch.rand(90, 2, 1, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
        inputs["gates"].view(90, 2, 3, 3).masked_fill_(closed, 0)
        expected, blocks = reference.nsa_attention(**double(inputs))
        o, chosen = native.nsa_attention(**inputs)
        torch.testing.assert_close(o.double(), expected, atol=4e-6, rtol=1e-5)
        assert torch.equal(chosen, blocks)


@pytest.mark.skipif(not compiled(), reason="no C compiler")
@pytest.mark.parametrize("S", [16 * 5, 16 * 9 + 3, 16 * 70 + 5])
def test_of_blocks_that_tie_the_first_are_chosen(S: int) -> None:
    exact, streamed = VARIANTS["fla"], VARIANTS["fla-old-streamed"]
    for variant in (exact, streamed):
        inputs = tensors((1, S, 2, 1, 16, 16), variant)
        inputs["k_cmp"] = torch.zeros_like(inputs["k_cmp"])
        _, chosen = native.nsa_attention(**inputs)
        current = (S - 1) // 16
        if variant is exact:
            expected = sorted([0, 1, current - 1, current])
        else:
            own = current // 8 * 8
            expected = [*range(min(own, 4)), *sorted({*range(own, min(own + 3, current)), current})]
        assert [j for j in chosen.flatten().tolist() if j >= 0] == expected


@pytest.fixture
def poisoned():
    """Uninitialized memory of this thread is NaN: torch fills it by itself; of the heap, 32 MB are filled and freed."""
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another thread has another heap
    torch.use_deterministic_algorithms(True)
    if libc:
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: mapped memory would be zero
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: what is freed stays
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        blocks = [libc.malloc(1 << 20) for _ in range(32)]
        for block in blocks:
            ctypes.memset(block, 0xFF, 1 << 20)
        for block in blocks:
            libc.free(block)
    yield
    if libc:
        libc.mallopt(-3, 128 * 1024)
        libc.mallopt(-1, 128 * 1024)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


class TestDispatch:
    def test_float64_takes_the_reference_and_gradients_take_masks(self, monkeypatch) -> None:
        monkeypatch.setattr(reference, "nsa_attention", lambda *_, **__: "reference")
        monkeypatch.setattr(masked, "nsa_attention", lambda *_, **__: "masked")
        assert nsa_attention(**double(tensors(SHAPES["G3"], PAPER))) == "reference"
        inputs = tensors(SHAPES["G3"], PAPER)
        inputs["q"].requires_grad_()
        assert nsa_attention(**inputs) == "masked"
        with torch.no_grad():
            assert nsa_attention(**inputs)[0].shape == (203, 6, 16)

    @pytest.mark.parametrize("names", [("q",), ("q", "k", "v"), ("v_cmp",), ("k_swa",)])
    def test_types_that_the_compiled_code_lacks_take_torch(self, names, monkeypatch) -> None:
        monkeypatch.setattr(native, "nsa_attention", lambda *_, **__: pytest.fail("not for float16"))
        monkeypatch.setattr(cpu, "nsa_attention", lambda *_, **__: "cpu")
        inputs = tensors(SHAPES["G3"], PAPER) | {"k_swa": torch.randn(203, 2, 16)}
        assert nsa_attention(**inputs | {name: inputs[name].half() for name in names}) == "cpu"

    def test_odd_widths_are_not_multiplied_in_pairs(self) -> None:
        assert not native.supports(torch.empty(4, 2, 15, dtype=torch.bfloat16))
        inputs = tensors((20, 50, 4, 2, 15, 7), PAPER, torch.bfloat16)
        truth, _ = reference.nsa_attention(**double(inputs))
        torch.testing.assert_close(nsa_attention(**inputs)[0].double(), truth, atol=0.03, rtol=0.02)

    @pytest.mark.skipif(not compiled(), reason="no C compiler")
    def test_a_compiler_is_used(self, monkeypatch) -> None:
        monkeypatch.setattr(cpu, "nsa_attention", lambda *_, **__: pytest.fail("the compiled code runs"))
        assert nsa_attention(**tensors(SHAPES["G3"], PAPER))[0].shape == (203, 6, 16)

    @pytest.mark.parametrize("dense_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("T", [1, 63, 130])
    def test_dense_attention_is_pytorchs(self, dense_dtype: torch.dtype, T: int) -> None:
        inputs = tensors((T, 130, 6, 2, 32, 32), PAPER, dense_dtype)
        got = dense_attention(inputs["q"], inputs["k"], inputs["v"], offset=130 - T)
        truth = sdpa(double(inputs))
        error, theirs = (got.double() - truth).abs().max(), (sdpa(inputs).double() - truth).abs().max()
        assert error <= 2 * theirs + torch.finfo(dense_dtype).eps * truth.abs().max()


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """The compiled code is looked for anew, in empty folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


class TestFallback:
    def computes(self) -> None:
        inputs = tensors(SHAPES["G3"], PAPER)
        truth, _ = reference.nsa_attention(**double(inputs))
        torch.testing.assert_close(nsa_attention(**inputs)[0].double(), truth, atol=3e-6, rtol=1e-5)

    def test_without_a_compiler(self, no_library, monkeypatch) -> None:
        monkeypatch.setenv("PATH", str(no_library))
        assert not compiled()
        self.computes()

    def test_with_a_compiler_that_fails(self, no_library, monkeypatch) -> None:
        compiler = no_library / "cc"
        compiler.write_text("#!/bin/sh\necho 'fatal error: cannot' >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("PATH", str(no_library))
        assert not compiled()
        self.computes()
        assert not list((no_library / "cache").rglob("*.so"))

    def test_with_a_compiler_that_vanished(self, no_library, monkeypatch) -> None:
        monkeypatch.setattr(library.shutil, "which", lambda name: "/nowhere/cc")
        assert not compiled()
        self.computes()

    def test_with_a_compiler_that_writes_rubbish(self, no_library, monkeypatch) -> None:
        def rubbish(command: list, **_) -> subprocess.CompletedProcess:
            target = command[command.index("-o") + 1]
            with open(target, "wb") as file:
                file.write(b"not a library")
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(library.shutil, "which", lambda name: "/usr/bin/cc")
        monkeypatch.setattr(library.subprocess, "run", rubbish)
        assert not compiled()
        self.computes()

    @pytest.mark.skipif(not compiled(), reason="no C compiler")
    def test_without_a_writable_cache_it_compiles_elsewhere(self, no_library, monkeypatch) -> None:
        (no_library / "cache").write_text("a file where the folder should be")
        assert compiled()
        assert [f.parent.name.partition("-")[0] for f in (no_library / "tmp").rglob("*.so")] == ["nsa"]
        self.computes()

    @pytest.mark.skipif(not compiled(), reason="no C compiler")
    def test_code_that_others_may_write_is_not_loaded(self, no_library) -> None:
        folder = library._cache_folder()
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        assert compiled()
        assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp", "softmax"])
def test_compression_of_each_kind(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(61, 2, 6, generator=g, dtype=torch.float64)
    position = torch.randn(2, 8, 6, generator=g, dtype=torch.float64)
    shapes = {
        "mean": None,
        "linear": [(2, 48, 5)],
        "mlp": [(2, 48, 7), (2, 7), (2, 7, 5), (2, 5)],
        "softmax": [(2, 6), (2, 8), (2, 6, 5)],
    }[kind]
    phi = None if shapes is None else [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    got = compress(x, PAPER, phi if phi is None else phi[0] if kind == "linear" else tuple(phi), position)
    assert got.shape[0] == PAPER.compressed_count(61) == 14
    for c in (0, 7, 13):
        for h in range(2):
            block = x[c * 4 : c * 4 + 8, h] + position[h]
            expected = block.mean(0)
            if kind == "linear":
                expected = block.flatten() @ phi[0][h]
            if kind == "mlp":
                hidden = torch.nn.functional.silu(block.flatten() @ phi[0][h] + phi[1][h])
                expected = hidden @ phi[2][h] + phi[3][h]
            if kind == "softmax":
                part = [(x_i @ phi[0][h] + bias_i).exp() for x_i, bias_i in zip(block, phi[1][h], strict=True)]
                expected = sum(p * x_i for p, x_i in zip(part, block, strict=True)) / sum(part) @ phi[2][h]
            torch.testing.assert_close(got[c, h], expected)


class TestPooling:
    """phi = (score, bias, weight): a mean with softmax weights."""

    @given(st.integers(0, 2**32), st.integers(8, 30), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    @settings(max_examples=20, deadline=None)
    def test_without_scores_it_is_the_mean(self, seed: int, tokens: int, dtype: torch.dtype) -> None:
        x = torch.randn(tokens, 2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        phi = torch.zeros(2, 6, dtype=dtype), torch.zeros(2, 8, dtype=dtype), torch.eye(6, dtype=dtype).expand(2, 6, 6)
        got = compress(x, PAPER, phi)
        assert got.dtype == dtype
        torch.testing.assert_close(got, compress(x, PAPER))

    @given(st.integers(0, 7), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    @settings(max_examples=10, deadline=None)
    def test_a_score_far_above_the_others_picks_its_token(self, token: int, dtype: torch.dtype) -> None:
        """And scores whose exp would overflow stay finite."""
        x = torch.randn(8, 1, 6, generator=torch.Generator().manual_seed(token)).to(dtype)
        bias = torch.full((1, 8), 1000.0, dtype=dtype)
        bias[0, token] = 2000
        phi = torch.zeros(1, 6, dtype=dtype), bias, torch.eye(6, dtype=dtype)[None]
        torch.testing.assert_close(compress(x, PAPER, phi)[0], x[token], rtol=0, atol=0)

    def test_weights_of_bfloat16_are_computed_in_float32(self) -> None:
        """exp of a score near 100 that is rounded to bfloat16 is off by up to exp(0.25)."""
        g = torch.Generator().manual_seed(0)
        phi = [torch.randn(s, generator=g).bfloat16() for s in ((2, 6), (2, 8), (2, 6, 5))]
        phi[0] *= 30
        x = torch.randn(61, 2, 6, generator=g).bfloat16()
        got, truth = compress(x, PAPER, tuple(phi)), compress(x.double(), PAPER, tuple(p.double() for p in phi))
        torch.testing.assert_close(got.double(), truth, atol=0.03, rtol=0.02)

    def test_gradients(self) -> None:
        g = torch.Generator().manual_seed(0)
        shapes = (21, 2, 4), (2, 4), (2, 8), (2, 4, 3), (2, 8, 4)
        leaves = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]

        def pooled(x, score, bias, weight, position) -> torch.Tensor:
            return compress(x, PAPER, (score, bias, weight), position)

        assert torch.autograd.gradcheck(pooled, leaves)

    def test_no_complete_block_has_the_width_of_the_map(self) -> None:
        phi = torch.zeros(2, 6), torch.zeros(2, 8), torch.zeros(2, 6, 5)
        assert compress(torch.randn(7, 2, 6), PAPER, phi).shape == (0, 2, 5)


def test_no_complete_block_compresses_to_nothing() -> None:
    assert compress(torch.randn(7, 2, 6), PAPER).shape == (0, 2, 6)


def test_streamed_topk_is_best_half_of_earlier_chunks_and_of_own() -> None:
    variant = Variant(16, 16, 16, 4, 0, 1, 0, topk="streamed", topk_chunk=4)
    importance = torch.tensor([9.0, 8, 7, 1, 2, 6, 3, 4, 5, 0]).expand(160, 1, 10)
    blocks = reference.select_blocks(importance, variant)
    assert blocks[159, 0].tolist() == [0, 1, 8, 9]  # chunk {8, 9}: both; earlier chunks: the best two
    assert blocks[112, 0].tolist() == [0, 1, 5, 7]  # block 7 forced, 5 the best other of its chunk
    assert blocks[20, 0].tolist() == [0, 1, -1, -1]


def test_gradients() -> None:
    variant = Variant(4, 2, 4, 3, 1, 1, 5)
    inputs = tensors((13, 13, 4, 2, 4, 2), variant, torch.float64)
    names = ("q", "k", "v", "gates")
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}

    def attend(*values: torch.Tensor) -> torch.Tensor:
        return nsa_attention(**(inputs | dict(zip(names, values, strict=True))))[0]

    assert torch.autograd.gradcheck(attend, tuple(leaves.values()), fast_mode=True)


LEARNED = ("q", "k", "v", "k_cmp", "v_cmp", "gates")


def gradients(inputs: dict, do: torch.Tensor) -> list[torch.Tensor]:
    leaves = [inputs[name].clone().requires_grad_() for name in LEARNED]
    o, _ = nsa_attention(**inputs | dict(zip(LEARNED, leaves, strict=True)))
    return torch.autograd.grad(o, leaves, do.to(o.dtype), materialize_grads=True)


@pytest.mark.parametrize("rows", [masked.ROWS, 64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_gradients_equal_the_references(variant: Variant, shape: tuple, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(masked, "ROWS", rows)
    inputs = tensors(shape, variant)
    do = torch.randn(shape[0], shape[2], shape[5], generator=torch.Generator().manual_seed(1))
    for got, truth in zip(gradients(inputs, do), gradients(double(inputs), do), strict=True):
        torch.testing.assert_close(got.double(), truth, atol=1e-5, rtol=1e-5)


def test_gradients_of_dense_attention(monkeypatch) -> None:
    monkeypatch.setattr(masked, "ROWS", 64)
    inputs = tensors((203, 240, 6, 2, 16, 12), PAPER)
    do = torch.randn(203, 6, 12, generator=torch.Generator().manual_seed(1))

    def found(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [inputs[name].to(dtype).requires_grad_() for name in ("q", "k", "v")]
        return torch.autograd.grad(dense_attention(*leaves, offset=37), leaves, do.to(dtype))

    for got, truth in zip(found(torch.float32), found(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), truth, atol=1e-5, rtol=1e-5)


def test_gradients_of_no_tokens() -> None:
    """As a batch with an empty sequence has."""
    inputs = {name: x.requires_grad_() for name, x in tensors((0, 0, 4, 2, 16, 8), PAPER).items() if name in LEARNED}
    o, chosen = nsa_attention(**inputs, variant=PAPER)
    assert o.shape == (0, 4, 8) and chosen.shape == (0, 2, PAPER.select_count)


def test_bfloat16_gradients_leave_out_branches_whose_gates_are_closed() -> None:
    inputs = tensors(SHAPES["G3"], PAPER, torch.bfloat16)
    inputs["gates"] = torch.tensor([14.0, -14.0]).sigmoid()[[1, 0, 1]].expand(203, 6, 3).to(torch.bfloat16)
    do = torch.randn(203, 6, 16, generator=torch.Generator().manual_seed(1))
    found, truth = gradients(inputs, do), gradients(double(inputs), do)
    assert not any(found[LEARNED.index(name)].any() for name in ("k_cmp", "v_cmp"))
    for got, expected in zip(found[:3], truth[:3], strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 0.01  # of three roundings to 8 bits: q, k and v, the probabilities, the result


def test_more_forced_blocks_than_a_streamed_topk_keeps_are_refused() -> None:
    with pytest.raises(ValueError, match="more blocks are forced"):
        Variant(16, 16, 16, 4, 1, 2, 32, topk="streamed", topk_chunk=8)


@pytest.mark.parametrize("path", EQUAL)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_fast_equals_reference_for_any_variant(path, data) -> None:
    stride = data.draw(st.sampled_from([1, 4, 8]), "d")
    variant = Variant(
        compress_block=stride * data.draw(st.integers(1, 4), "l/d"),
        compress_stride=stride,
        select_block=stride * data.draw(st.integers(1, 4), "l'/d"),
        select_count=data.draw(st.integers(4, 9), "n"),
        initial_blocks=data.draw(st.integers(0, 2), "initial"),
        local_blocks=data.draw(st.integers(1, 2), "local"),
        window=data.draw(st.integers(0, 40), "w"),
        importance_map=data.draw(st.sampled_from(["geometric", "literal"]), "map"),
    )
    if data.draw(st.booleans(), "streamed"):
        even = 2 * max(variant.select_count // 2, variant.initial_blocks + variant.local_blocks)
        variant = replace(variant, select_count=even, topk="streamed", topk_chunk=data.draw(st.integers(2, 9), "chunk"))
    S = data.draw(st.integers(1, 150), "S")
    T = data.draw(st.integers(1, S), "T")
    HKV, G = data.draw(st.integers(1, 2), "HKV"), data.draw(st.integers(1, 3), "G")
    inputs = tensors((T, S, HKV * G, HKV, 8, 6), variant, seed=data.draw(st.integers(0, 99), "seed"))
    _, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = path.nsa_attention(**inputs)
    score, truth = judged(double(inputs), chosen)
    best, _ = judged(double(inputs), blocks)  # ties may be broken otherwise: the scores count, not the indices
    torch.testing.assert_close(score.sort(-1).values, best.sort(-1).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


def judged(inputs: dict, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of each of `blocks` (T, HKV, n), -1 = absent, and the output (T, HQ, Dv) with them as the choice."""
    q, k, v, variant, offset = (inputs[name] for name in ("q", "k", "v", "variant", "offset"))
    o_cmp, p = reference.compressed_attention(q, inputs["k_cmp"], inputs["v_cmp"], variant, offset)
    importance = reference.block_importance(p, k.shape[1], variant, variant.block_count(k.shape[0]))
    score = importance.gather(2, blocks.long().clamp(min=0)).masked_fill(blocks < 0, -1)
    o_slc = reference.selected_attention(q, k, v, blocks, variant, offset)
    o_swa = reference.window_attention(q, k, v, variant, offset)
    gates = inputs["gates"][..., None]
    return score, gates[:, :, 0] * o_cmp + gates[:, :, 1] * o_slc + gates[:, :, 2] * o_swa
