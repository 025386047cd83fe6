"""Are the attention kernels right? Against the equations in float64, beside the same in PyTorch in the kernels' dtype.

The kernels run on the whole sequence; compared are queries of its beginning, middle and end, since float64 scores of
all would be 2 TB at 64k tokens of 64 heads. Gradients: those that these queries cause, over the whole sequence, and
all of a shorter one. The kernels' outputs are NaN before, so that what is not written is found.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nsa_cli.kernel_cases import Case, decode_inputs, prefill_inputs
from nsa_kernels import Variant
from nsa_models.errors import CheckError

if TYPE_CHECKING:
    import torch

CHECKED = 16  # queries at each of three places: float64 scores of 64 heads over 256k keys take 2 GB
CHECKED_BACKWARD = 4  # autograd holds some twenty tensors of that size
WHOLE = 1536  # tokens of the sequence that is compared whole: more than the 1024 that all are selected of
QUERIES = ("q", "gates")  # have a row a query; the others a row a key
SLACK = 1e-6  # what float32 sums differ by, where PyTorch's error happens to be less


class Check:
    """Compares one case after another. Methods return errors by name; CheckError where one is too large."""

    def __init__(self, device: "torch.device", dtype: "torch.dtype", variant: Variant) -> None:
        self.device, self.dtype, self.variant = device, dtype, variant

    def run(self, case: Case) -> dict:
        if case.kind in ("decode", "ragged"):
            return self.decode(case)
        return self.backward(case) if case.kind.endswith("backward") else self.forward(case)

    def forward(self, case: Case) -> dict:
        import torch

        from nsa_kernels import gpu

        x = prefill_inputs(case, self.variant, self.device, self.dtype)
        with torch.no_grad():
            with poisoned_outputs():
                o, chosen = gpu.nsa_attention(**x, variant=self.variant)
            self.require_finite(o, "o")
            found = [self.compare(self.part(x, rows), o[rows], chosen[rows]) for rows in places(case.tokens, CHECKED)]
        return worst(found)

    def decode(self, case: Case) -> dict:
        """Of the first, a middle and the last sequence of the batch."""
        import torch

        from nsa_kernels.decode import decode_attention, decode_dense

        x = decode_inputs(case, self.variant, self.device, self.dtype)
        found, B = [], case.batch
        with torch.no_grad():
            with poisoned_outputs():
                o, chosen = decode_attention(**x, variant=self.variant)
                dense = decode_dense(x["q"], x["k"], x["v"], x["lengths"])
            self.require_finite(o, "o")
            for b in sorted({0, B // 2, B - 1}):
                length, rows = int(x["lengths"][b]), slice(b, b + 1)
                one = {n: x[n][b].transpose(0, 1)[:length] for n in ("k", "v")}
                count = self.variant.compressed_count(length)
                one |= {n: x[n][b].transpose(0, 1)[:count] for n in ("k_cmp", "v_cmp")}
                one |= {n: x[n][rows] for n in QUERIES}
                found.append(self.compare(one, o[rows], chosen[rows]) | self.compare_dense(one, dense[rows]))
        return worst(found)

    def backward(self, case: Case) -> dict:
        """Gradients of a whole short sequence, then of the case's own, from a few queries."""
        short = Case("backward", min(case.tokens, WHOLE), case.shape)
        found = {"whole": self.gradients(short, [slice(0, short.tokens)])}
        return found | {"parts": self.gradients(case, places(case.tokens, CHECKED_BACKWARD))}

    def gradients(self, case: Case, rows: list[slice]) -> dict:
        """Where only the outputs of `rows` matter: the largest error of each gradient, over that of PyTorch's."""
        import torch

        from nsa_kernels import gpu

        x = prefill_inputs(case, self.variant, self.device, self.dtype)
        ours = {n: t.requires_grad_() for n, t in x.items()}
        with poisoned_outputs():
            o, chosen = gpu.nsa_attention(**ours, variant=self.variant)
            do = torch.zeros_like(o)
            for part in rows:
                do[part] = torch.randn_like(o[part])
            mine = dict(zip(ours, torch.autograd.grad(o, list(ours.values()), do), strict=True))
        del o
        truth, theirs = (self.reference_gradients(x, chosen, do, rows, d) for d in (torch.float64, self.dtype))
        errors = {}
        for n, exact in truth.items():
            self.require_finite(mine[n], f"d{n}")
            if n in QUERIES:
                every, mine[n] = mine[n], torch.cat([mine[n][part] for part in rows])
                if every.count_nonzero() != mine[n].count_nonzero():
                    raise CheckError(f"d{n} is not zero where no output matters")
            errors[f"d{n}"] = self.require(largest(mine[n], exact), largest(theirs[n], exact), f"d{n}")
        return errors

    def reference_gradients(self, x: dict, chosen, do, rows: list[slice], dtype) -> dict:
        """What the queries at these places cause: their own gradients, and the sum of those of keys and values."""
        import torch

        total = {n: [] if n in QUERIES else torch.zeros_like(t, dtype=dtype) for n, t in x.items()}
        for part in rows:
            leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in self.part(x, part).items()}
            o, _, _ = self.equations(leaves, chosen[part])
            found = torch.autograd.grad(o, list(leaves.values()), do[part].to(dtype))
            for (n, leaf), gradient in zip(leaves.items(), found, strict=True):
                if n in QUERIES:
                    total[n].append(gradient)
                else:
                    total[n][: leaf.shape[0]] += gradient
        return total | {n: torch.cat(total[n]) for n in QUERIES}

    def part(self, x: dict, rows: slice) -> dict:
        """These queries, and the keys up to the last of them."""
        count = self.variant.compressed_count(rows.stop)
        ends = {"k": rows.stop, "v": rows.stop, "k_cmp": count, "v_cmp": count}
        return {n: t[rows] if n in QUERIES else t[: ends[n]] for n, t in x.items()}

    def equations(self, x: dict, chosen):
        """Eq. 5 to 12 for the last queries of a sequence with these blocks: o, the importance of every block, and the
        blocks that it makes the best.
        """
        from nsa_kernels import reference

        v, S = self.variant, x["k"].shape[0]
        offset = S - x["q"].shape[0]
        o_cmp, p = reference.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], v, offset)
        importance = reference.block_importance(p.detach(), x["k"].shape[1], v, v.block_count(S))
        o_slc = reference.selected_attention(x["q"], x["k"], x["v"], chosen, v, offset)
        o_swa = reference.window_attention(x["q"], x["k"], x["v"], v, offset)
        gates = x["gates"].unsqueeze(-1).unbind(2)
        total = sum(g * o for g, o in zip(gates, (o_cmp, o_slc, o_swa), strict=True))
        return total, importance, reference.select_blocks(importance, v, offset)

    def compare(self, x: dict, o, chosen) -> dict:
        """o, and the choice by its importance, since near ties may fall either way."""
        exact = {n: t.double() for n, t in x.items()}
        truth, importance, best = self.equations(exact, chosen)
        theirs, _, _ = self.equations(x, chosen)
        errors = {"o": self.require(largest(o, truth), largest(theirs, truth), "o")}
        return errors | {"importance_missed": self.missed_importance(importance, best, chosen)}

    def compare_dense(self, x: dict, o) -> dict:
        from nsa_kernels import reference

        offset = x["k"].shape[0] - x["q"].shape[0]
        q, k, v = (x[n] for n in ("q", "k", "v"))
        truth = reference.dense_attention(q.double(), k.double(), v.double(), offset=offset)
        theirs = reference.dense_attention(q, k, v, offset=offset)
        return {"dense": self.require(largest(o, truth), largest(theirs, truth), "dense attention")}

    def missed_importance(self, importance, best, chosen) -> float:
        """How much less important the chosen blocks are than the best ones, of the largest importance."""
        none = chosen < 0
        if not (none == (best < 0)).all():
            raise CheckError("another number of blocks is chosen")
        if not ((chosen.diff(dim=-1) > 0) | none[..., 1:]).all():
            raise CheckError("chosen blocks do not ascend")
        shared = (best[..., :, None] == chosen[..., None, :]).any(-1)  # forced ones must be
        scale = float(importance.abs().max().clamp(min=1e-30))
        forced = self.forced(best, best.amax(-1, keepdim=True))
        if not (shared | ~forced).all():
            raise CheckError("a forced block is not chosen")

        def weights(blocks):
            return importance.gather(2, blocks.long().clamp(min=0)).masked_fill(blocks < 0, 0).sort(-1).values

        missed = float((weights(best) - weights(chosen)).max()) / scale
        if not missed <= 1e-4:  # scores are summed in float32 whatever the dtype
            raise CheckError(f"chosen blocks miss {missed:.2g} of the largest importance")
        return missed

    def forced(self, blocks, current):
        """Which of these blocks no importance decides about; current: the query's own."""
        return (blocks >= 0) & ((blocks < self.variant.initial_blocks) | (blocks > current - self.variant.local_blocks))

    def require(self, error: float, torch_error: float, what: str) -> dict:
        """At most twice PyTorch's error. NaN is not at most anything."""
        if not error <= 2 * torch_error + SLACK:
            raise CheckError(f"{what} is off by {error:.2g} of its largest, PyTorch's by {torch_error:.2g}")
        return {"error": error, "torch_error": torch_error}

    def require_finite(self, x: "torch.Tensor", what: str) -> None:
        if not x.isfinite().all():
            raise CheckError(f"{what} has elements that were not written, or are not finite")


def places(tokens: int, count: int) -> list[slice]:
    """`count` queries at the beginning, the middle and the end, or all at once where there are not more."""
    if tokens <= 3 * count:
        return [slice(0, tokens)]
    return [slice(start, start + count) for start in (0, (tokens - count) // 2, tokens - count)]


def largest(got: "torch.Tensor", truth: "torch.Tensor") -> float:
    """The largest error, relative to the largest value."""
    if not truth.numel():
        return 0.0
    return float((got.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def worst(found: list[dict]) -> dict:
    """Of several places or sequences the largest of each."""
    return {
        name: max((check[name] for check in found), key=lambda x: x["error"] if isinstance(x, dict) else x)
        for name in found[0]
    }


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """torch.empty starts as NaN: what no program writes stays NaN."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are not deterministic, which is not what this is about
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
