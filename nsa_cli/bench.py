"""How fast this machine reads and answers: NSA, and dense attention over the same weights, beside its matrix rate.

Operations counted are those of products alone: two per weight of the layers' linear maps and token, and those of
queries and probabilities with the keys and values that attention reads; dense attention reads all before a token, and a
branch that no gate lets through is left out (`computed_branches`).
"""

import platform
import re
import resource
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cli.units import format_bytes
from nsa_models.config import NSAConfig
from nsa_models.cost import BRANCHES, attention_operations, dense_operations, estimate_memory, linear_parameters
from nsa_models.errors import BudgetError, InputError

if TYPE_CHECKING:
    import torch

    from nsa_models import Cache, NSAModel

SCHEMA_VERSION = 1
FIRST_CHUNK = 1024  # tokens read before anything is timed, so that one-time costs fall there
MATRIX = 2048  # rows and columns of the product that stands for what the machine can do


@dataclass(frozen=True)
class Rate:
    """Per second: the median, and what 10 % of the samples stayed below and above."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, work: float, seconds: Sequence[float]) -> "Rate":
        """work: done in each of the `seconds`."""
        rates = [work / s for s in seconds]
        tenths = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else rates * 9
        return cls(statistics.median(rates), tenths[0], tenths[-1])


@dataclass(frozen=True)
class Speed:
    """One kind of attention at one length."""

    prefill: Rate  # tokens/s
    decode: Rate  # tokens/s, after the prefill
    operations: int  # of the prefill's products
    share: float  # of the matrix rate that the prefill reached
    peak_bytes: int  # of the process, on a GPU of what torch allocated there


def measure(
    model: "NSAModel",
    ids: Sequence[int],
    *,
    dense: bool,
    matrix_rate: float,
    decode_tokens: int = 32,
    repeat: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Speed:
    """Read `ids` `repeat` times, then generate. progress: called with tokens done and in all, over all repeats."""
    from nsa_models import Cache, prefill

    T = len(ids)
    reset_peak(model.device)
    cache = Cache.for_model(model, T + decode_tokens)
    seconds = []
    for run in range(repeat):
        cache.truncate(0)
        start = now(model.device)
        logits = prefill(
            model, ids, cache, dense=dense, progress=lambda done, _, before=run * T: progress(before + done, repeat * T)
        )
        seconds.append(now(model.device) - start)
    rate = Rate.of(T, seconds)
    work = operations(model.config, T, dense, computed_branches(model))
    decode_rate = Rate.of(1, list(decode_seconds(model, cache, logits, decode_tokens, dense)))
    return Speed(rate, decode_rate, work, work * rate.median / T / matrix_rate, peak_bytes(model.device))


def decode_seconds(
    model: "NSAModel", cache: "Cache", logits: "torch.Tensor", tokens: int, dense: bool
) -> Iterator[float]:
    """The time of each of `tokens` steps."""
    from nsa_models import Sampling, decode

    stream = decode(model, cache, logits, Sampling(max_tokens=tokens + 1), dense=dense)
    next(stream)  # chosen from the prefill's logits, without a step
    start = now(model.device)
    for _ in stream:
        end = now(model.device)
        yield end - start
        start = end


def operations(config: NSAConfig, tokens: int, dense: bool, branches: Sequence[str] = BRANCHES) -> int:
    """Multiply-adds times two of a prefill's products; see above what is counted."""
    attention = dense_operations(config, tokens) if dense else attention_operations(config, tokens, branches)
    return 2 * linear_parameters(config) * tokens + attention


def computed_branches(model: "NSAModel") -> list[str]:
    """Compiled code in bfloat16 leaves out the branches that no gate lets through; other code computes all."""
    import torch

    from nsa_kernels.native import supports

    example = torch.empty(1, 1, model.config.head_dim, dtype=model.dtype, device=model.device)
    leaves_out = model.dtype == torch.bfloat16 and supports(example)
    return model.open_branches() if leaves_out else list(BRANCHES)


def first_chunk(model: "NSAModel", ids: Sequence[int]) -> float:
    """Seconds for the first tokens that a freshly loaded model reads."""
    from nsa_models import Cache, prefill

    start = now(model.device)
    prefill(model, ids[:FIRST_CHUNK], Cache.for_model(model, FIRST_CHUNK))
    return now(model.device) - start


def matrix_rate(model: "NSAModel", repeat: int = 7) -> float:
    """Operations/s of a product of two square matrices in the model's dtype, as the device does it by itself."""
    import torch

    a = torch.randn(MATRIX, MATRIX, device=model.device).to(model.dtype)
    b, seconds = a.T.contiguous(), []
    for _ in range(repeat + 1):
        start = now(model.device)
        a @ b
        seconds.append(now(model.device) - start)
    return 2 * MATRIX**3 / statistics.median(seconds[1:])


def check_lengths(
    config: NSAConfig, lengths: Iterable[int], decode_tokens: int, weights_bytes: int, available: int
) -> None:
    """Raise BudgetError, before anything is allocated, for a length that fits neither the model nor `available` bytes
    of memory.
    """
    for length in lengths:
        tokens = length + decode_tokens
        if tokens > config.max_position_embeddings:
            raise BudgetError(
                f"--lengths {length:,}: with {decode_tokens:,} tokens to generate {tokens:,}, "
                f"the model's contexts hold {config.max_position_embeddings:,}"
            )
        needed = estimate_memory(config, tokens, weights_bytes)
        if needed > available:
            raise BudgetError(
                f"--lengths {length:,}: {format_bytes(needed)} of memory needed, {format_bytes(available)} are free; "
                "leave it out, or close other programs"
            )


def token_ids(tokenizer, texts: Iterable[str], count: int) -> list[int]:
    """The first `count` tokens of the texts, one after the other, from the start again where they end too soon."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
        if len(ids) >= count:
            break
    if not ids:
        raise InputError("--text: the file is empty")
    return (ids * -(-count // len(ids)))[:count]


def library_sources() -> Iterator[str]:
    """Text that every machine has and in which attention finds something: Python's own modules, by name."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def describe_machine(model: "NSAModel") -> dict:
    import torch

    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def cpu_name() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def now(device: "torch.device") -> float:
    """Seconds, once the device is done with what was asked of it."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_since_start() -> float:
    """How long this process has been running."""
    import psutil

    return time.time() - psutil.Process().create_time()


def reset_peak(device: "torch.device") -> None:
    """Begin a new measurement of `peak_bytes`, where the system can (Linux, CUDA)."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: "torch.device") -> int:
    """The most memory used at a time since `reset_peak`, or since the process started."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def record(tokens: int, speeds: dict[str, Speed], **about) -> dict:
    """What --json prints for one length; a kind of attention that was not measured is null."""
    shown = {name: asdict(speeds[name]) if name in speeds else None for name in ("nsa", "dense")}
    return {"schema_version": SCHEMA_VERSION, "tokens": tokens} | shown | about


HEADER = (
    f"{'tokens':>9}  {'attention':9}  {'prefill tokens/s':>25}  {'decode tokens/s':>25}  {'of matrix rate':>14}  "
    f"{'peak memory':>11}"
)


def row(tokens: int, name: str, speed: Speed) -> str:
    """A line under HEADER."""
    return (
        f"{tokens:>9,}  {name:9}  {_range(speed.prefill):>25}  {_range(speed.decode):>25}  {speed.share:>14.0%}  "
        f"{format_bytes(speed.peak_bytes):>11}"
    )


def _range(rate: Rate) -> str:
    digits = 1 if rate.median < 100 else 0
    return f"{rate.median:,.{digits}f} ({rate.low:,.{digits}f}-{rate.high:,.{digits}f})"
