"""What runs where on a GPU, without one: fake tensors on "cuda" know devices and shapes, and refuse to mix devices or
to give the host a value. Kernels are not launched; their arguments are looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_kernels import Packing, Variant
from nsa_models import Cache, NSAConfig, prefill
from nsa_models.retrieval import RetrievalMass
from nsa_models.transformer import NSAModel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

CONFIG = NSAConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position_embeddings=4096,
    retrieval_heads=((1, 0), (1, 4)),
)
CONFIGS = {
    "mean": replace(CONFIG, tie_word_embeddings=True, qkv_bias=True),
    "linear": replace(CONFIG, compress_kind="linear", compress_positions=True, compress_rope="after"),
    "paper": replace(CONFIG, branch_kv=True, compress_kind="mlp", compress_positions=True, compress_rope="none"),
    "G16": replace(CONFIG, num_heads=32),
}


class OnDevice(TorchDispatchMode):
    """Fails where an operation has a tensor elsewhere: a copy between host and device, which no CUDA graph may hold."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, torch.Tensor) or x.device.type != "cpu", operation
        return result


class Methods(TorchFunctionMode):
    """Methods of fake tensors that a torch without CUDA begins by choosing their device, before it asks the mode."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not (args and isinstance(args[0], torch.Tensor) and args[0].is_cuda):
            return function(*args, **(kwargs or {}))
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            x, index, *value = args
            if isinstance(index, torch.Tensor):
                return torch.ops.aten.index(x, [index])
            like = torch.empty_strided(x.shape, x.stride(), device="meta")[index]
            part = x.as_strided(like.shape, like.stride(), x.storage_offset() + like.storage_offset())
            return torch.ops.aten.copy_(part, *value) if value else part
        if function is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if function is torch.Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_gpu() -> Iterator[None]:
    with FakeTensorMode(), Methods():
        yield


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the kernels that were asked for. Each must have its tensors on the device."""
    from triton.runtime.interpreter import InterpretedFunction

    from nsa_kernels import decode, flash, ranged, select, selected

    found: list[str] = []
    current = [0]

    @contextmanager
    def device(where: torch.device) -> Iterator[None]:
        current.append(where.index)
        yield
        current.pop()

    def run(self, *args, grid, warmup, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        assert tensors and all(x.is_cuda for x in tensors), self.__name__
        assert all(x.device.index == current[-1] for x in tensors), self.__name__  # Triton launches on the current one
        assert all(isinstance(size, int) for size in grid), self.__name__  # a grid from the device would be a wait
        found.append(self.__name__)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "device", device)
    for module in (decode, flash, ranged, select, selected):
        monkeypatch.setattr(module, "target_of", lambda x: "cuda:90")
    monkeypatch.setattr(decode, "_programs", lambda q: 528)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reading_stays_on_the_device(launches: list[str], config: NSAConfig) -> None:
    """A prefill, and one that continues it and looks where its words lead, wait for nothing."""
    with fake_gpu():
        model = NSAModel(config, device="cuda", dtype=torch.bfloat16)
        cache = Cache.for_model(model, 3000)
        assert prefill(model, list(range(50)) * 40, cache).is_cuda
        retrieval = RetrievalMass(config, 2000)
        assert prefill(model, [1, 2, 3], cache, retrieval=retrieval).is_cuda
        assert prefill(model, [4], cache, dense=True).is_cuda
    assert {"_select", "_forward"} <= set(launches)


def test_a_second_gpu_gets_its_launches(launches: list[str]) -> None:
    with fake_gpu():
        model = NSAModel(CONFIGS["paper"], device="cuda:1", dtype=torch.bfloat16)
        cache = Cache.for_model(model, 3000)
        assert prefill(model, list(range(50)) * 40, cache).device.index == 1
        assert prefill(model, [4], cache, dense=True).device.index == 1
    assert launches


@pytest.mark.parametrize("dense", [False, True], ids=["nsa", "dense"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_can_be_captured(launches: list[str], config: NSAConfig, dense: bool) -> None:
    """No operation of a step waits for the device or moves a tensor, and its results lie where the last ones did."""
    from nsa_models.graph import DeviceStep, supports

    with fake_gpu():
        model = NSAModel(config, device="cuda", dtype=torch.bfloat16)
        cache = Cache.for_model(model, 3000)
        assert supports(model, cache)
        step = DeviceStep(model, cache, dense)
        step.run()
        buffers = dict(cache.buffers), step.token, step.length
        with OnDevice():
            assert step.run().shape == (config.vocab_size,)
        assert all(
            a is b
            for a, b in zip(tree_leaves(buffers), [*cache.buffers.values(), step.token, step.length], strict=True)
        )
    assert {"_append", "_compress_newest", "_stream_part"} <= set(launches)


@pytest.mark.parametrize("heads", [6, 32])
def test_a_packed_batch_waits_for_nothing(launches: list[str], heads: int) -> None:
    """Nobody asks the device how long its sequences are."""
    from nsa_kernels import gpu, selected

    T, variant = 3000, Variant()
    with fake_gpu():
        q, k, v, gates = (torch.empty(T, h, d, device="cuda") for h, d in ((heads, 16), (2, 16), (2, 16), (heads, 3)))
        bounds = torch.empty(4, device="cuda", dtype=torch.int32)
        with OnDevice():
            packing = Packing(bounds, T, variant)
            compressed = [gpu.compress(x, variant, packing=packing) for x in (k, v)]
            o, chosen = gpu.nsa_attention(q, k, v, *compressed, gates, variant, packing=packing)
            call = selected._Call(q, k, v, chosen, 64, 0, 1.0, packing)
            call.key_gradients(o, torch.empty(2, T, heads // 2, device="cuda"), q)
    assert launches.count("_select") == 1 and launches.count("_sum_pieces") == 2


@pytest.mark.parametrize("heads", [6, 32])
def test_gradients_wait_for_nothing(launches: list[str], heads: int) -> None:
    """Of the selected branch, whose lists of who chose what are made on the way."""
    from nsa_kernels import selected

    T = 2000
    with fake_gpu(), OnDevice():
        q, k, v = (torch.empty(T, h, 16, device="cuda", dtype=torch.bfloat16) for h in (heads, 2, 2))
        chosen = torch.empty(T, 2, 16, device="cuda", dtype=torch.int32)
        lse = torch.empty(2, T, heads // 2, device="cuda")
        call = selected._Call(q, k, v, chosen, 64, 0, 1.0)
        by = call.query_gradient_by_block if heads < 32 else call.query_gradient_by_query
        assert all(x.is_cuda for x in (by(q, lse, lse), *call.key_gradients(q, lse, lse)))
    assert "_block_backward_kv" in launches


def test_what_would_wait_is_found() -> None:
    with fake_gpu():
        x = torch.empty(3, dtype=torch.int64, device="cuda")
        with pytest.raises(DynamicOutputShapeException):
            torch.bincount(x)
        with pytest.raises(AssertionError), OnDevice():
            x.cpu()
