"""What the tests share: a tiny checkpoint with a tokenizer, and `nsa` run inside this process."""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the other animals in the old forest\n"

# As cli.main does, before torch is loaded. Beside busy programs, threads that spin made 1,000 jobs take 413 s, not 20.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell starts background jobs with interrupts ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def no_settings(tmp_path_factory) -> None:
    """The tests do not see what the user has set."""
    os.environ["NSA_CONFIG_DIR"] = str(tmp_path_factory.mktemp("config"))
    os.environ.pop("NSA_LOG", None)


@pytest.fixture
def one_thread():
    """Operations of tiny models are slower on two, the more so beside other programs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> bytes:
    """A byte-level BPE `tokenizer.json` of a few hundred tokens with ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_tokenizer: bytes) -> Path:
    """A random NSA checkpoint for 32k tokens, with a chat template. It answers in letters and never ends by itself."""
    import json

    from tokenizers import Tokenizer

    from nsa_models import NSAConfig, save_model
    from tests.models.tiny import random_model

    tokenizer = Tokenizer.from_str(tiny_tokenizer.decode())
    config = NSAConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=32768,
        select_count=4,
        window=64,
        retrieval_heads=((1, 0),),
        eos_token_ids=(tokenizer.token_to_id("<|im_end|>"),),
    )
    model = random_model(config)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.mul_(20)  # attention that prefers some keys to others, as a trained model's does
    wordless = [i for i in range(config.vocab_size) if not tokenizer.id_to_token(i).strip("Ġ").isascii()]
    control = [i for i in range(config.vocab_size) if not tokenizer.id_to_token(i).strip("Ġ").isalpha()]
    model.lm_head.weight[wordless + control] = 0
    directory = tmp_path_factory.mktemp("models") / "tiny"
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}
    files = {"tokenizer.json": tiny_tokenizer, "tokenizer_config.json": json.dumps(settings).encode()}
    save_model(model, directory, files)
    return directory


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, tiny_tokenizer: bytes) -> Path:
    """A random dense qwen2 of one layer as a GGUF file of llama.cpp's."""
    import json

    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    vocabulary = json.loads(tiny_tokenizer)
    tokens = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)
    control = {token["content"] for token in vocabulary["added_tokens"]}
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(CHAT_TEMPLATE)
    shapes = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    shapes |= {"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "blk.0.attn_output.weight": (32, 32)}
    shapes |= {"blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32)}
    shapes |= {"blk.0.ffn_gate.weight": (48, 32), "blk.0.ffn_up.weight": (48, 32), "blk.0.ffn_down.weight": (32, 48)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3 + ("norm" in name)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def nsa(tiny_checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> Callable[..., Run]:
    """`nsa("ask", path, "question", stdin="text")` -> exit code, stdout, stderr; with its own store."""
    from nsa_cli.cli import run

    monkeypatch.setenv("NSA_MODEL", str(tiny_checkpoint))
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("NSA_CONFIG_DIR", str(tmp_path / "config"))

    def call(*args: object, stdin: str | bytes = "") -> Run:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Run(code, *capsys.readouterr())

    return call
