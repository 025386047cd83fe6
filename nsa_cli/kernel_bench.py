"""How fast the attention kernels are on a GPU, beside PyTorch's attention and a dense Triton kernel."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from nsa_cli.kernel_cases import Case, decode_inputs, prefill_inputs
from nsa_kernels import Variant

if TYPE_CHECKING:
    import torch

BACKENDS = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION", "sdpa_efficient": "EFFICIENT_ATTENTION"}
SECONDS, RUNS = 0.5, (3, 25)  # a median is taken of as many runs as fit, within these bounds
FLUSH = 2**28  # bytes written before each run: more than any GPU's L2 cache, which may hold a decode step's keys
WRITES = 12  # of those bytes, 1 ms at 3 TB/s: longer than the host takes to launch what is timed, some ten kernels


class Timer:
    """Medians on one device: "cuda", or "cpu" with Triton's interpreter, whose times mean nothing."""

    def __init__(self, device: "torch.device", dtype: "torch.dtype", variant: Variant) -> None:
        import torch

        self.device, self.dtype, self.variant, self.on_gpu = device, dtype, variant, device.type == "cuda"
        self.flush = torch.empty(FLUSH if self.on_gpu else 0, dtype=torch.uint8, device=device)

    def run(self, case: Case) -> dict:
        """Milliseconds of NSA and of each kind of dense attention, None where a backend does not take the shape."""
        if case.kind in ("decode", "ragged"):
            return self.decode(case)
        return self.backward(case) if case.kind == "backward" else self.forward(case)

    def forward(self, case: Case) -> dict:
        """With the compression of keys and values, which dense attention does not need."""
        import torch

        from nsa_kernels import gpu

        x = prefill_inputs(case, self.variant, self.device, self.dtype)
        q, k, v = x["q"], x["k"], x["v"]
        with torch.no_grad():
            nsa = self.median_ms(lambda: self.attention(x))
            dense = {"triton_dense": self.median_ms(lambda: gpu.dense_attention(q, k, v))}
            for name, makers in self.sdpa(q, k, v):
                dense[name] = self.first_ms(makers)
        return times(case, nsa, dense)

    def backward(self, case: Case) -> dict:
        import torch

        from nsa_kernels import gpu

        x = prefill_inputs(case, self.variant, self.device, self.dtype)
        x = {name: x[name].requires_grad_() for name in ("q", "k", "v", "gates")}
        qkv = [x[name] for name in ("q", "k", "v")]

        def gradients(forward: Callable[[], "torch.Tensor"], inputs: list = qkv) -> Callable[[], object]:
            o = forward()
            do = torch.randn_like(o)
            return lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)

        nsa = self.median_ms(gradients(lambda: self.attention(x), list(x.values())))
        dense = {"triton_dense": self.median_ms(gradients(lambda: gpu.dense_attention(*qkv)))}
        for name, makers in self.sdpa(*qkv):
            dense[name] = self.first_ms(makers, gradients)
        return times(case, nsa, dense)

    def attention(self, x: dict) -> "torch.Tensor":
        from nsa_kernels import gpu

        k_cmp, v_cmp = (gpu.compress(x[name], self.variant) for name in ("k", "v"))
        return gpu.nsa_attention(x["q"], x["k"], x["v"], k_cmp, v_cmp, x["gates"], self.variant)[0]

    def decode(self, case: Case) -> dict:
        """A step in a CUDA graph, as the engine runs it, and the memory rate on the bytes that NSA must touch."""
        import torch

        from nsa_kernels.decode import decode_attention, decode_dense

        x, v, s = decode_inputs(case, self.variant, self.device, self.dtype), self.variant, case.shape
        nsa = self.median_ms(self.graph(lambda: decode_attention(**x, variant=v)))
        dense = {"triton_dense": self.median_ms(self.graph(lambda: decode_dense(x["q"], x["k"], x["v"], x["lengths"])))}
        if case.kind == "decode":  # PyTorch has none for sequences of different lengths in one cache
            for name, makers in self.sdpa(x["q"][:, :, None], x["k"], x["v"]):
                dense[name] = self.first_ms(makers, self.graph)
        rows = sum(keys_touched(v, int(length)) for length in x["lengths"])
        rate = s.HKV * rows * (s.D + s.Dv) * torch.finfo(self.dtype).bits // 8 / nsa / 1e6
        peak = self.bandwidth()
        return times(case, nsa, dense) | {"gb_per_s": rate, "copy_gb_per_s": peak, "share": rate / peak}

    def sdpa(self, q, k, v) -> Iterator[tuple[str, list[Callable[[], Callable[[], "torch.Tensor"]]]]]:
        """PyTorch's own attention by backend: what makes the call with the keys of a group shared, and what makes it
        with their copies. q: (T, HQ, D) causal, or a decode step's (B, HQ, 1, D).
        """
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        causal = q.ndim == 3
        if causal:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))

        def make(backend: SDPBackend, copies: int) -> Callable[[], "torch.Tensor"]:
            keys, values = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
            grouped = keys.shape[1] != q.shape[1]

            def call() -> "torch.Tensor":
                with sdpa_kernel([backend]):
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, keys, values, is_causal=causal, enable_gqa=grouped
                    )

            return call

        for name, backend in BACKENDS.items() if self.on_gpu else {"sdpa_math": "MATH"}.items():
            found = getattr(SDPBackend, backend)
            yield name, [lambda b=found, n=copies: make(b, n) for copies in (1, q.shape[1] // k.shape[1])]

    def first_ms(self, makers: list, build: Callable[[Callable], Callable] = lambda call: call) -> float | None:
        """The median of what is built from the first call that works; None where none does."""
        import torch

        for make in makers:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # why a backend does not take the shape
                    return self.median_ms(build(make()))
            except (RuntimeError, torch.OutOfMemoryError):
                continue
        return None

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """`call` as a CUDA graph, as an engine runs it; in the interpreter as it is."""
        import torch

        if not self.on_gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # kernels are compiled outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def median_ms(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            return 1000 * self.seconds(call)
        self.seconds(call)  # kernels are compiled
        low, high = RUNS
        runs = max(low, min(high, int(SECONDS / self.seconds(call))))
        return 1000 * statistics.median([self.seconds(call) for _ in range(runs)])

    def seconds(self, call: Callable[[], object]) -> float:
        import torch

        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(WRITES):  # while they are written, the host gets ahead of the device
            self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def bandwidth(self) -> float:
        """GB/s of a copy, read and written: what memory does at best."""
        import torch

        x = torch.empty(2**30 if self.on_gpu else 2**22, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return 2 * x.numel() / self.median_ms(lambda: y.copy_(x)) / 1e6


def times(case: Case, nsa: float, dense: dict[str, float | None]) -> dict:
    """Milliseconds, how many times as fast NSA is, and what a query head takes."""
    speedup = {name: ms / nsa if ms else None for name, ms in dense.items()}
    return {"ms": {"nsa": nsa} | dense, "speedup": speedup, "ms_per_query_head": nsa / case.shape.HQ}


def keys_touched(variant: Variant, tokens: int) -> int:
    """Keys, and as many values, that a step after `tokens` tokens cannot do without, over all branches."""
    selected = min(tokens, variant.select_count * variant.select_block)
    return variant.compressed_count(tokens) + selected + min(tokens, variant.window)


def machine(device: "torch.device", dtype: "torch.dtype") -> dict:
    import torch
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": name} | versions | {"dtype": str(dtype).removeprefix("torch.")}
