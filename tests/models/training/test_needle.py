"""A two-layer NSA model learns from nothing to find a needle among 512 tokens, and does not without selection.

`make needle` runs this; it takes minutes. The compressed branch's output is shut, as a converted model's is: it would
find one needle among few blocks by itself. It still chooses the blocks, which is the point.
"""

from pathlib import Path

import pytest
import torch

from nsa_models.config import NSAConfig
from nsa_models.training.batch import Batch
from nsa_models.training.config import Data, Loss, Optimizer, Stage, TrainConfig
from nsa_models.training.forward import hidden_states, output_logits
from nsa_models.training.loop import Trainer
from nsa_models.training.state import RunFolder
from nsa_models.training.student import Student, fresh_weights

VALUES, QUESTION, FILLER = 16, 16, 47  # tokens 0..15 are values, 16 asks, 17..63 fill
CURRICULUM = (
    Stage(200, 64, 16 * 64),
    Stage(20, 128, 8 * 128),
    Stage(40, 256, 8 * 256),
    Stage(300, 512, 8 * 512),
)


def config(select_count: int) -> NSAConfig:
    return NSAConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=512,
        gate_bias=True,
        compress_block=8,
        compress_stride=8,
        select_block=16,
        select_count=select_count,
        initial_blocks=0,
        local_blocks=1,
        window=16,
    )


def sequences(index: int, length: int, count: int) -> Batch:
    """A value somewhere among fillers, out of the window of the eight questions that end the sequence."""
    random = torch.Generator().manual_seed(index)
    ids = torch.randint(QUESTION + 1, QUESTION + 1 + FILLER, (count, length), generator=random)
    values = torch.randint(VALUES, (count,), generator=random)
    ids[torch.arange(count), torch.randint(length - 24, (count,), generator=random)] = values
    ids[:, -8:] = QUESTION
    targets = torch.full_like(ids, -1)
    targets[:, -8:] = values[:, None]
    asked = torch.ones(count * length, dtype=torch.bool)
    return Batch(ids.flatten(), targets.flatten(), targets.flatten() >= 0, asked, [length] * count)


def train(folder: Path, select_count: int) -> float:
    """The share of right answers at 512 tokens after training on 64, 128, 256 and 512."""
    torch.set_num_threads(1)
    plan = TrainConfig(
        out=str(folder),
        curriculum=CURRICULUM,
        data=Data(),
        fresh={},
        tokenizer="none",
        loss=Loss(text=0),
        optimizer=Optimizer(rate=1e-2, nsa_rate=1e-2, final=0.3),
        recompute=False,
        save_every=1000,
    )
    shape = config(select_count)
    start = fresh_weights(shape, 0)
    start["model.embeddings.weight"] *= 50  # 0.02 is for tables of thousands
    for name in start:
        if name.endswith("g_proj.bias"):
            start[name].view(-1, 3)[:, 0] = -14

    def batches(step: int, index: int) -> Batch:
        stage = plan.stage(step)
        return sequences(index, stage.length, stage.batch_tokens // stage.length)

    student = Student(shape, start, plan, "cpu", torch.float32)
    Trainer(plan, student, batches, RunFolder(folder)).run(report=lambda r: print(r) if r["step"] % 20 == 0 else None)
    test = sequences(10**6, 512, 64)
    with torch.no_grad():
        x = hidden_states(shape, student.weights, test.ids, test.lengths)
        guess = output_logits(shape, student.weights, x[test.answers]).argmax(-1)
    return (guess == test.targets[test.answers]).float().mean().item()


@pytest.mark.slow
def test_the_needle_is_found_by_selection(tmp_path):
    found, without = train(tmp_path / "on", select_count=8), train(tmp_path / "off", select_count=1)
    print(f"right at 512 tokens: {found:.0%} with 8 of 32 blocks selected, {without:.0%} with the own block alone")
    assert found >= 0.9
    assert without <= 0.25, "chance is 6 %: something else than selection carries the needle"
