"""Invariants of NSA at odd sizes, on the reference and on the CPU path, and the CPU path against the reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_kernels import Variant, compress, cpu, nsa_attention, reference

PAPER = Variant(compress_block=8, compress_stride=4, select_block=16, select_count=5, window=24)
VARIANTS = {
    "paper": PAPER,
    "literal-map": replace(PAPER, importance_map="literal"),
    "fla": Variant(16, 16, 16, 4, 1, 2, 32),
    "fla-old-streamed": Variant(16, 16, 16, 8, 0, 1, 32, topk="streamed", topk_chunk=8),
    "forced-only": Variant(8, 8, 16, 3, 1, 2, 7),
    "no-window": Variant(8, 8, 32, 4, 0, 1, 0),
    "wide-overlap": Variant(32, 8, 16, 6, 2, 1, 100),
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


def sdpa(inputs: dict) -> torch.Tensor:
    """PyTorch's own attention over the same queries and keys, dense and causal: (T, HQ, Dv)."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    T, HQ, _ = q.shape
    visible = torch.arange(k.shape[0]) <= inputs["offset"] + torch.arange(T)[:, None]
    k, v = (x.repeat_interleave(HQ // k.shape[1], 1).transpose(0, 1) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=visible)
    return o.transpose(0, 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_cpu_equals_reference(variant: Variant, shape: tuple) -> None:
    inputs = tensors(shape, variant)
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = cpu.nsa_attention(**inputs)
    assert torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    """With every block selected, CPU path and PyTorch compute the same softmax; float64 judges both."""
    variant = replace(PAPER, select_count=40)
    inputs = tensors((150, 333, 6, 2, 64, 64), variant, dtype)
    inputs["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=dtype).expand(150, 6, 3)
    truth = sdpa(double(inputs))
    ours = (cpu.nsa_attention(**inputs)[0].double() - truth).abs().max()
    theirs = (sdpa(inputs).double() - truth).abs().max()
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("path", [reference, cpu], ids=["reference", "cpu"])
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


def test_own_keys_for_window_and_own_queries_for_compression() -> None:
    inputs = tensors((70, 130, 6, 2, 16, 24), PAPER)
    other = tensors((70, 130, 6, 2, 16, 24), PAPER, seed=1)
    inputs |= dict(q_cmp=other["q"], k_swa=other["k"], v_swa=other["v"])
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = cpu.nsa_attention(**inputs)
    assert torch.equal(chosen, blocks)
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


def test_few_queries_gather_their_blocks_and_many_share_them() -> None:
    """Both ways of attending to freely chosen blocks, at the sizes where the rule picks the one and the other."""
    for T in (9, 400):
        inputs = tensors((T, 1000, 3, 1, 16, 16), PAPER)
        truth, _ = reference.nsa_attention(**double(inputs))
        torch.testing.assert_close(cpu.nsa_attention(**inputs)[0].double(), truth, atol=3e-6, rtol=1e-5)


def test_bfloat16_keys_are_read_as_they_are() -> None:
    inputs = tensors((90, 200, 6, 2, 16, 16), PAPER)
    rounded = {name: inputs[name].bfloat16() for name in ("k", "v")}
    truth, _ = reference.nsa_attention(**(double(inputs | rounded)))
    o, _ = cpu.nsa_attention(**(inputs | rounded))
    torch.testing.assert_close(o.double(), truth, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_compression_of_each_kind(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(61, 2, 6, generator=g, dtype=torch.float64)
    position = torch.randn(2, 8, 6, generator=g, dtype=torch.float64)
    shapes = {"mean": None, "linear": [(2, 48, 5)], "mlp": [(2, 48, 7), (2, 7), (2, 7, 5), (2, 5)]}[kind]
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
            torch.testing.assert_close(got[c, h], expected)


def test_no_complete_block_compresses_to_nothing() -> None:
    assert compress(torch.randn(7, 2, 6), PAPER).shape == (0, 2, 6)


def test_streamed_topk_is_best_half_of_earlier_chunks_and_of_own() -> None:
    variant = Variant(16, 16, 16, 4, 0, 1, 0, topk="streamed", topk_chunk=4)
    importance = torch.tensor([9.0, 8, 7, 1, 2, 6, 3, 4, 5, 0]).expand(160, 1, 10)
    blocks = reference.select_blocks(importance, variant)
    assert blocks[159, 0].tolist() == [0, 1, 8, 9]  # chunk {8, 9}: both; earlier chunks: the best two
    assert blocks[112, 0].tolist() == [0, 1, 5, 7]  # block 7 forced, 5 the best other of its chunk
    assert blocks[20, 0].tolist() == [0, 1, -1, -1]


def test_gradients_take_the_reference() -> None:
    inputs = tensors((40, 40, 4, 2, 8, 8), PAPER, torch.float64)
    names = ("q", "k", "v", "gates")
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}

    def attend(*values: torch.Tensor) -> torch.Tensor:
        return nsa_attention(**(inputs | dict(zip(names, values, strict=True))))[0]

    assert torch.autograd.gradcheck(attend, tuple(leaves.values()))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_cpu_equals_reference_for_any_variant(data) -> None:
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
    S = data.draw(st.integers(1, 150), "S")
    T = data.draw(st.integers(1, S), "T")
    HKV, G = data.draw(st.integers(1, 2), "HKV"), data.draw(st.integers(1, 3), "G")
    inputs = tensors((T, S, HKV * G, HKV, 8, 6), variant, seed=data.draw(st.integers(0, 99), "seed"))
    truth, blocks = reference.nsa_attention(**double(inputs))
    o, chosen = cpu.nsa_attention(**inputs)
    same = (chosen == blocks).all(-1).repeat_interleave(G, -1)  # a near tie in float32 may choose otherwise
    assert same.float().mean() > 0.98
    torch.testing.assert_close(o.double()[same], truth[same], atol=3e-6, rtol=1e-5)
