"""`nsa train` from outside: it learns, resumes exactly, and every mistake is one line that harms no saved state."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nsa_models.training.config import read_train_config
from nsa_models.training.kinds import KINDS
from nsa_models.training.sources import SOURCES

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("the", "boat", "left", "harbour", "at", "dawn", "and", "keeper", "lit", "a", "lamp", "while", "rain", "fell")


@pytest.fixture
def run_folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A folder with texts, and a config of a few quick steps."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        lines = [" ".join(WORDS[(i * 7 + j * 3 + k) % len(WORDS)] for k in range(9)) for j in range(60)]
        (texts / f"log{i}.txt").write_text("\n".join(lines) + "\n")
    (texts / "code.py").write_text("".join(f"def work_{i}(left, right_{i}):\n    return left\n\n" for i in range(20)))
    config(tmp_path, tiny_checkpoint)
    return tmp_path


def config(folder: Path, checkpoint: Path, **changes) -> Path:
    """Write run.yaml: `changes` replace keys of the whole."""
    values = {
        "model": str(checkpoint),
        "out": str(folder / "run"),
        "curriculum": [{"steps": 3, "length": 192}, {"steps": 3, "length": 320, "accumulate": 2}],
        "data": {"texts": [{"path": str(folder / "texts")}], "tasks": {"needle": 1, "takes": 1}, "task_share": 0.5},
        "optimizer": {"rate": "3e-3", "nsa_rate": 0.01, "warmup": 1},
        "gate_bias": 2,
        "save_every": 2,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return folder / "run.yaml"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "checkpoint" / "model.safetensors")


def test_a_run_leaves_a_checkpoint_that_answers(run_folder, nsa):
    run = nsa("train", run_folder / "run.yaml")
    assert run.code == 0, run.err
    assert run.out == "" and "step 6 of 6" in run.err and "tokens/s" in run.err
    records = metrics(run_folder)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "norm", "rate", "tokens", "length", "seconds"} <= records[0].keys()
    assert (run_folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    answer = nsa(
        "ask", run_folder / "texts", "Which boat?", "--model", run_folder / "run/checkpoint", "--max-tokens", 4
    )
    assert answer.code == 0 and answer.out.strip()


def test_the_loss_falls(run_folder, tiny_checkpoint, nsa):
    config(
        run_folder,
        tiny_checkpoint,
        curriculum=[{"steps": 25, "length": 96}],
        data={"texts": [{"path": str(run_folder / "texts")}]},
        optimizer={"rate": 0.01, "warmup": 3},
    )
    assert nsa("train", run_folder / "run.yaml").code == 0
    losses = [r["text"] for r in metrics(run_folder)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_killed_run_continues_bit_for_bit(run_folder, tiny_checkpoint, nsa):
    assert nsa("train", run_folder / "run.yaml").code == 0
    whole, expected = outcome(run_folder), metrics(run_folder)
    shutil.rmtree(run_folder / "run")

    command = [sys.executable, "-m", "nsa_cli", "train", str(run_folder / "run.yaml"), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        lines = run_folder / "run" / "metrics.jsonl"
        while process.poll() is None and not (lines.is_file() and lines.read_text().count("\n") >= 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run_folder / "run" / "checkpoint").exists()

    again = nsa("train", run_folder / "run.yaml")
    assert again.code == 0 and "going on after step" in again.err
    resumed = outcome(run_folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in m] for m in (expected, metrics(run_folder))]
    assert timeless[0] == timeless[1]


def test_slices_continue_one_another(run_folder, nsa):
    assert nsa("train", run_folder / "run.yaml").code == 0
    whole = outcome(run_folder)
    shutil.rmtree(run_folder / "run")
    for done in range(1, 6):  # a slice of no time makes one step
        slice_ = nsa("train", run_folder / "run.yaml", "--minutes", 1e-9)
        assert slice_.code == 0 and f"stopped after step {done} of 6" in slice_.err
    assert nsa("train", run_folder / "run.yaml").code == 0
    assert all(torch.equal(whole[name], tensor) for name, tensor in outcome(run_folder).items())
    assert len(list((run_folder / "run").glob("state-*.pt"))) == 2, "older states go"


def test_a_delta_is_what_changed(run_folder, tiny_checkpoint, nsa):
    from nsa_models import load_model
    from nsa_models.delta import merge_delta
    from nsa_models.training.student import float_weights

    config(run_folder, tiny_checkpoint, delta={"rank": 2, "base_sha256": "f00d"}, loss={"kl": 1, "hidden": 0.1})
    assert nsa("train", run_folder / "run.yaml").code == 0
    assert {"kl", "hidden", "text"} <= set().union(*metrics(run_folder))
    start = float_weights(load_model(tiny_checkpoint, "cpu", torch.float32))
    merged = merge_delta(start, run_folder / "run" / "delta.safetensors", "f00d")
    got = outcome(run_folder)
    changed = {name for name in start if not torch.equal(start[name], got[name])}
    assert changed and all("_norm." in n or ".norm." in n or "attn." in n for n in changed)
    assert "model.embeddings.weight" not in changed and not any("mlp." in n for n in changed)
    low_rank = {name for name in changed if name.endswith(tuple(f".{which}_proj.weight" for which in "qkvo"))}
    assert low_rank
    for name in low_rank:  # both factors are int8, half of 1/127 off each
        assert (merged[name] - got[name]).abs().max() < 0.02 * (got[name] - start[name]).abs().max(), name
    for name in changed - low_rank:
        torch.testing.assert_close(merged[name], got[name], rtol=2**-8, atol=0)  # bfloat16


@pytest.mark.parametrize(
    "name, shorter, lengths",
    [
        ("delta", 128, [32, 128, 256, 1024]),
        ("recall", 8, [128, 256, 512, 1024]),
        ("locate", 8, [512, 1024]),
        ("reread", 4, [256, 1024, 256, 1024]),
        ("wordings", 4, [288, 1024, 288]),
        ("plain", 4, [288]),
        ("signatures", 4, [288, 1024, 288]),
        ("mentions", 4, [288, 1024, 288, 1024, 288]),
        ("ranked", 4, [288]),
    ],
)
def test_the_shipped_deltas_in_slices(name, shorter, lengths, run_folder, tiny_checkpoint, nsa):
    """The shipped config as it is, but for a tiny model, texts of the test and shorter sequences, a step of each."""
    from nsa_models import load_model
    from nsa_models.training.student import float_weights

    shipped = yaml.safe_load((files("nsa_models") / "training" / "configs" / f"{name}.yaml").read_text("utf-8"))
    for stage in shipped["curriculum"]:
        lengths_of = stage.keys() & {"length", "batch_tokens"}
        stage |= {"steps": 1} | {key: stage[key] // shorter for key in lengths_of}
    shipped["data"]["texts"] = [{"path": str(run_folder / "texts")}]
    model = shutil.copytree(tiny_checkpoint, run_folder / "model")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"reread": 500}))
    shipped |= {"model": str(model), "out": str(run_folder / "run")}
    (run_folder / "run.yaml").write_text(yaml.safe_dump(shipped))
    for step in range(1, len(lengths)):
        slice_ = nsa("train", run_folder / "run.yaml", "--minutes", 1e-9)
        assert slice_.code == 0 and f"stopped after step {step} of {len(lengths)}" in slice_.err
    assert nsa("train", run_folder / "run.yaml", "--minutes", 9).code == 0
    assert [r["length"] for r in metrics(run_folder)] == lengths
    start, got = float_weights(load_model(tiny_checkpoint, "cpu", torch.float32)), outcome(run_folder)
    changed = {name for name in start if not torch.equal(start[name], got[name])}
    assert any("q_proj" in name for name in changed) and not any("g_proj" in name for name in changed)
    delta = load_file(run_folder / "run" / "delta.safetensors")
    assert any("lora_up" in name for name in delta) and not any("g_proj" in name for name in delta)
    assert nsa("models", "check", run_folder / "run" / "checkpoint").code == 0


def test_the_shipped_selection_teaches_compression_alone(run_folder, tiny_checkpoint, nsa):
    """`nsa train selection` as it is, but for a tiny model, texts of the test and an 8th of its lengths, few steps."""
    from nsa_models import load_model
    from nsa_models.checkpoint import save_checkpoint
    from nsa_models.convert import means
    from nsa_models.dense import TOKENIZER_FILES
    from nsa_models.training.student import float_weights

    shipped = yaml.safe_load((files("nsa_models") / "training" / "configs" / "selection.yaml").read_text("utf-8"))
    for stage in shipped["curriculum"]:
        stage |= {"length": stage["length"] // 8, "steps": 2}
    shipped["data"]["texts"] = [{"path": str(run_folder / "texts")}]
    start = run_folder / "start"
    shipped |= {"model": str(start), "out": str(run_folder / "run")}
    (run_folder / "run.yaml").write_text(yaml.safe_dump(shipped))
    shutil.copytree(tiny_checkpoint, start)
    refused = nsa("train", run_folder / "run.yaml")
    assert refused.code == 3 and "nsa convert --compress-kind softmax" in refused.err and refused.err.count("\n") == 1
    shutil.rmtree(start)
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    config = replace(model.config, compress_kind="softmax")
    tensors = float_weights(model) | means(config)
    paths = [tiny_checkpoint / name for name in TOKENIZER_FILES]
    tokenizer = {path.name: path.read_bytes() for path in paths if path.is_file()}
    save_checkpoint(start, config, tensors, tokenizer)
    assert nsa("train", run_folder / "run.yaml").code == 0
    assert all({"select", "loss"} <= record.keys() for record in metrics(run_folder))
    got = outcome(run_folder)
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, got[name])}
    assert changed and all(".compress_k." in name for name in changed)
    assert changed == load_file(run_folder / "run" / "delta.safetensors").keys(), "and nothing that stayed as it was"
    assert nsa("models", "check", run_folder / "run" / "checkpoint").code == 0


def test_the_readmes_config_is_one(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(# run.yaml.*?)^```$", readme, re.M | re.S)
    (tmp_path / "run.yaml").write_text(block)
    plan = read_train_config(tmp_path / "run.yaml")
    assert plan.steps == 300 and set(plan.data.tasks) <= set(KINDS) and plan.data.texts[0].source in SOURCES


def test_a_new_model(run_folder, tiny_checkpoint, nsa):
    shape = dict(hidden_size=16, num_hidden_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24)
    config(run_folder, tiny_checkpoint, model=None, fresh=shape, tokenizer=str(tiny_checkpoint))
    assert nsa("train", run_folder / "run.yaml").code == 0
    assert nsa("models", "check", run_folder / "run/checkpoint").code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sav_every": 3}, "unknown 'sav_every'; did you mean 'save_every'?"),
        ({"optimizer": {"rte": 1}}, "unknown 'optimizer.rte'; did you mean 'optimizer.rate'?"),
        ({"curriculum": [{"steps": 2, "lenght": 64}]}, "did you mean 'curriculum[0].length'?"),
        ({"curriculum": [{"steps": "many", "length": 64}]}, "curriculum[0].steps must be a whole number, got 'many'"),
        ({"curriculum": []}, "curriculum is empty"),
        ({"curriculum": [{"steps": 1, "length": 99999}]}, "the model is made for 32,768"),
        ({"curriculum": [{"steps": 1, "length": 64, "context": 99999}]}, "a stage has 99,999 tokens"),
        ({"curriculum": [{"steps": 1, "length": 64, "context": -1}]}, "batch_tokens and context must not be negative"),
        ({"data": {"texts": []}}, "no data"),
        ({"data": {"texts": [{"path": "nowhere.txt"}]}}, "no such file or directory: nowhere.txt"),
        ({"data": {"texts": [{"path": "/dev/null/x.jsonl"}]}}, "/dev/null/x.jsonl: Not a directory"),
        ({"data": {"reread_share": 2}}, "data.reread_share must lie between 0 and 1, got 2.0"),
        ({"data": {"reworded_share": -1}}, "data.reworded_share must lie between 0 and 1, got -1.0"),
        ({"data": {"follow_ups": -1}}, "data.follow_ups must not be negative, got -1"),
        ({"curriculum": [{"steps": 1, "length": 64, "reread_share": 2}]}, "a stage's reread_share must lie between"),
        ({"curriculum": [{"steps": 1, "length": 64, "task_share": -1}]}, "a stage's task_share must lie between"),
        ({"data": {"tasks": {}}, "curriculum": [{"steps": 1, "length": 64, "task_share": 1}]}, "needs data.tasks"),
        ({"data": {"texts": [{"source": "jinja2"}]}}, "jinja2 is held out for evaluation"),
        ({"data": {"texts": [{"source": "wikipedia"}]}}, "no source 'wikipedia'"),
        ({"model": "nowhere"}, "no checkpoint nowhere"),
        ({"delta": {"maps": ["q_prj"]}}, "did you mean 'q_proj'?"),
        ({"optimizer": {"rate": float("nan")}}, "optimizer.rate must be a number, got nan"),
    ],
)
def test_a_mistake_is_one_line(run_folder, tiny_checkpoint, nsa, changes, words):
    config(run_folder, tiny_checkpoint, **changes)
    run = nsa("train", run_folder / "run.yaml")
    assert run.code in (2, 3, 5) and words in run.err and len(run.err.splitlines()) == 1, run.err
    assert not (run_folder / "run").exists()


def test_passages_for_a_model_that_answers_from_none(run_folder, tiny_checkpoint, nsa):
    data = {"texts": [{"path": str(run_folder / "texts")}], "tasks": {"needle": 1}, "task_share": 1}
    one_stage = [{"steps": 1, "length": 64, "reread_share": 0.5}]
    for changes in ({"data": data | {"reread_share": 0.5}}, {"data": data, "curriculum": one_stage}):
        config(run_folder, tiny_checkpoint, **changes)
        run = nsa("train", run_folder / "run.yaml")
        assert run.code == 3 and "config.json says reread 0" in run.err and run.err.count("\n") == 1


def test_positions_that_nothing_scales(run_folder, tiny_checkpoint, nsa):
    """In dual chunks they are the same in a context of any length: a stage's `context` would do nothing."""
    model = shutil.copytree(tiny_checkpoint, run_folder / "model")
    values = json.loads((model / "config.json").read_text())
    chunks = {"kind": "dual_chunk", "factor": 4.0, "original_max_position_embeddings": 8192, "chunk": 1024}
    (model / "config.json").write_text(json.dumps(values | {"rope_scaling": chunks}))
    config(run_folder, model, curriculum=[{"steps": 1, "length": 64, "context": 2048}])
    run = nsa("train", run_folder / "run.yaml")
    assert run.code == 3 and "dual chunks, which nothing scales: leave it out" in run.err and run.err.count("\n") == 1
    config(run_folder, model, curriculum=[{"steps": 1, "length": 64}])
    assert nsa("train", run_folder / "run.yaml").code == 0


def test_a_text_that_is_no_config(run_folder, nsa):
    (run_folder / "run.yaml").write_text("out: [1, 2\nmodel: x")
    assert "run.yaml: not YAML (line 2)" in nsa("train", run_folder / "run.yaml").err
    (run_folder / "run.yaml").write_text("just words")
    assert "the file must be a mapping" in nsa("train", run_folder / "run.yaml").err
    assert "nowhere.yaml: No such file" in nsa("train", "nowhere.yaml").err
    assert nsa("train").code == 2


def test_a_text_that_vanishes_or_changes_between_slices(run_folder, nsa):
    assert nsa("train", run_folder / "run.yaml", "--minutes", 1e-9).code == 0
    kept = (run_folder / "texts" / "log0.txt").read_text()
    (run_folder / "texts" / "log0.txt").unlink()
    run = nsa("train", run_folder / "run.yaml")
    assert run.code == 5 and "its states are of another config, model or data" in run.err
    (run_folder / "texts" / "log0.txt").write_text(kept)
    assert nsa("train", run_folder / "run.yaml").code == 0, "the state was left alone"


def test_a_loss_that_is_no_number_keeps_the_last_good_state(run_folder, tiny_checkpoint, nsa):
    assert nsa("train", run_folder / "run.yaml", "--minutes", 1e-9).code == 0
    from nsa_models.training.loop import Trainer

    computed = Trainer.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer, "losses", lambda self, batch: {k: v * torch.nan for k, v in computed(self, batch).items()}
        )
        run = nsa("train", run_folder / "run.yaml")
    assert run.code == 1 and "step 2: the loss is nan; the last good state is that of step 1" in run.err
    assert nsa("train", run_folder / "run.yaml").code == 0


def test_a_full_disk_keeps_the_last_good_state(run_folder, nsa, monkeypatch):
    assert nsa("train", run_folder / "run.yaml", "--minutes", 1e-9).code == 0
    save = torch.save

    def half(state, stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    run = nsa("train", run_folder / "run.yaml")
    assert run.code == 1 and "cannot save the state (No space left on device); the last good state is" in run.err
    assert [f.name for f in (run_folder / "run").glob("state*")] == ["state-000001.pt"]
    monkeypatch.setattr(torch, "save", save)
    assert nsa("train", run_folder / "run.yaml").code == 0


def test_a_state_cut_short_is_passed_over(run_folder, nsa):
    assert nsa("train", run_folder / "run.yaml").code == 0
    whole = outcome(run_folder)
    newest = sorted((run_folder / "run").glob("state-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    run = nsa("train", run_folder / "run.yaml")
    assert run.code == 0 and "going on after step 4" in run.err
    assert all(torch.equal(whole[name], tensor) for name, tensor in outcome(run_folder).items())


def test_interrupts_save_the_step_at_hand(run_folder, nsa, monkeypatch):
    from nsa_models.training.loop import Trainer

    advance = Trainer.advance

    def interrupted(self, batches):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return advance(self, batches)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    run = nsa("train", run_folder / "run.yaml")
    assert run.code == 130 and "step 3 is saved" in run.err
    monkeypatch.setattr(Trainer, "advance", advance)
    assert "going on after step 3" in nsa("train", run_folder / "run.yaml").err


def test_two_processes_train_one_model(run_folder, tiny_checkpoint):
    config(run_folder, tiny_checkpoint, curriculum=[{"steps": 2, "length": 128}])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "nsa_cli", "train", str(run_folder / "run.yaml"), "--threads", "1", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("step 2 of 2: loss") == 1, "one of them reports"
    records = metrics(run_folder)
    assert [r["step"] for r in records] == [1, 2] and all(128 < r["tokens"] <= 256 for r in records)


def test_sources_are_listed_with_their_licences(nsa):
    run = nsa("train", "--sources")
    assert run.code == 0
    assert (
        "psutil" in run.out
        and "BSD-3-Clause  held out" in run.out
        and "config gates\n" in run.out
        and "config delta\n" in run.out
    )
