"""A config on disk -> texts, weights, a trainer: what `nsa train` runs. Imports torch late."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nsa_cli.output import VERBOSE, emit, say, shows_bars, warn
from nsa_cli.settings import cache_dir, resolve_model
from nsa_cli.units import format_seconds
from nsa_models.errors import InputError, ModelError
from nsa_models.training.config import TrainConfig, read_train_config

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_models import NSAConfig
    from nsa_models.text import Text
    from nsa_models.tokenizer import Tokenizer
    from nsa_models.training.data import Corpus, Layout, Passage
    from nsa_models.training.loop import Group, Teacher, Trainer
    from nsa_models.training.tasks import Task


def find_config(path: Path) -> Path:
    """A file, or one that comes with nsa by its name."""
    shipped = resources.files("nsa_models") / "training" / "configs" / f"{path}.yaml"
    return path if path.exists() or not shipped.is_file() else Path(str(shipped))


def show_sources() -> None:
    """Sources and shipped configs, a line each, on stdout."""
    from nsa_models.training.sources import SOURCES

    for name, source in SOURCES.items():
        held = "  held out: evaluation only" if source.held_out else ""
        emit(f"{name:15}{source.package:22}{source.manager:5}{source.licence}{held}\n")
    configs = resources.files("nsa_models") / "training" / "configs"
    for name in sorted(f.name.removesuffix(".yaml") for f in configs.iterdir() if f.name.endswith(".yaml")):
        emit(f"config {name}\n")


def sources_dir() -> Path:
    return cache_dir() / "sources"


def prepare(path: Path) -> None:
    """Fetch the sources that the config names."""
    corpora(read_train_config(find_config(path)))


def corpora(plan: TrainConfig) -> list[tuple["Corpus", float]]:
    """What the config's texts hold, less what is held out, with their weights."""
    from nsa_cli.documents.ignore import Rules
    from nsa_models.training.data import Corpus
    from nsa_models.training.sources import SOURCES

    held_out = Rules().adding("", plan.data.held_out)
    found = []
    for text in plan.data.texts:
        if text.source in SOURCES and SOURCES[text.source].held_out:
            raise InputError(f"config: data.texts: {text.source} is held out for evaluation; it is not trained on")
        documents = source_texts(text.source) if text.source else path_texts(text.path)
        documents = [d for d in documents if not held_out.matches(d.path.lstrip("/"), is_directory=False)]
        if not documents:
            raise InputError(f"{text.source or text.path}: nothing is left to train on; see data.held_out")
        found.append((Corpus(documents), text.weight))
    if not found:
        raise InputError("config: no data: name at least one source or path in data.texts")
    return found


def source_texts(name: str) -> list:
    """The documents of a source, fetched if it is not at hand."""
    from nsa_models.training.data import read_corpus
    from nsa_models.training.sources import fetch

    return read_corpus(fetch(name, sources_dir(), lambda line: say(f"nsa: {line}")))


def path_texts(path: str) -> list:
    """The documents of a file or folder as every command reads them, or of a .jsonl of documents."""
    from nsa_cli.documents import ReadOptions, read_documents
    from nsa_models.training.data import read_corpus

    if path.endswith(".jsonl"):
        return read_corpus(Path(path))
    documents, skips = read_documents([path], ReadOptions())
    if skips:
        say(f"nsa: {path}: {len(skips)} files are no text and were not read", VERBOSE)
    return [d if d.text.endswith("\n") else replace(d, text=d.text + "\n") for d in documents]


def layout(tokenizer: "Tokenizer", config: "NSAConfig", cited: bool = False) -> "Layout":
    """Texts become a context as those that a question is asked about, and passages as those that are read again."""
    from nsa_cli.context import build_context
    from nsa_cli.documents import Document
    from nsa_cli.practice import practice_passages
    from nsa_models.text import Text
    from nsa_models.training.data import Layout, Passage

    def context(texts: Sequence["Text"]) -> list[int]:
        return build_context([Document(text.path, text.text) for text in texts], tokenizer).ids

    def passages(rng: random.Random, task: "Task", room: int) -> "list[Passage]":
        found = practice_passages(rng, task, tokenizer, config, min(config.reread, room))
        return [Passage(Text(part.path, part.text), part.ids, part.first_line) for part in found]

    return Layout(tokenizer, context, passages, cited)


def train(path: Path, minutes: float | None, device: str | None, threads: int | None, export: bool) -> None:
    """Train from the last saved state on, to the end or for `minutes`, loading included; then write what came of it."""
    began = time.monotonic()
    plan = read_train_config(find_config(path))
    with processes() as group:
        trainer, outcome = make_trainer(plan, device, threads, group)
        if not export:
            done = run(trainer, None if minutes is None else began + 60 * minutes)
            if group.rank == 0:
                draw(trainer)
            if not done:
                say(f"nsa: stopped after step {trainer.step:,} of {plan.steps:,}; the same command goes on")
                return
        if group.rank == 0:
            outcome()


@contextmanager
def processes() -> Iterator["Group"]:
    """This process among those that `torchrun` started; alone without it."""
    from nsa_models.training.loop import Group

    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:  # torchrun's contract
        yield Group()
        return
    import torch

    torch.distributed.init_process_group()  # gloo for tensors on CPUs, nccl on GPUs
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        yield Group(torch.distributed.get_rank(), torch.distributed.get_world_size())
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
        # Threads of gloo's outlive it for a moment ("terminate called without an active exception"): of processes that
        # ended at once one aborted in 7 of 10 runs, with half a second in between none.
        time.sleep(0.5)


def make_trainer(
    plan: TrainConfig, device: str | None, threads: int | None, group: "Group"
) -> tuple["Trainer", Callable[[], None]]:
    """The trainer, at its last saved state, and what writes the checkpoint in the end."""
    import torch

    from nsa_models.training.data import Mixture, digest
    from nsa_models.training.loop import Trainer
    from nsa_models.training.state import RunFolder
    from nsa_models.training.student import Student

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device was found; leave out --device to use the CPU")
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(plan.dtype)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    texts = corpora(plan)
    config, start, home, fingerprint = starting_point(plan)
    from nsa_models import load_tokenizer

    tokenizer = load_tokenizer(home)
    if plan.rereads and not config.reread:
        raise InputError("config: reread_share: the model answers from no passages; its config.json says reread 0")
    check_stages(plan, config)
    trainer = Trainer(
        plan,
        Student(config, start, plan, place, dtype),
        Mixture(plan, texts, layout(tokenizer, config, plan.data.cited)),
        RunFolder(plan.out, plan.keep),
        teacher(plan, config, start, place, dtype) if plan.teacher_wanted else None,
        identity=identity(plan, fingerprint, digest(texts), tokenizer.digest, group.size),
        group=group,
        device=place,
        dtype=dtype,
    )
    return trainer, lambda: write_outcome(trainer, start, home, fingerprint)


def check_stages(plan: TrainConfig, config: "NSAConfig") -> None:
    """Raises InputError for stages that the model is not made for."""
    longest = max(max(stage.length, stage.context) for stage in plan.curriculum)
    if longest > config.max_position_embeddings:
        raise InputError(
            f"config: a stage has {longest:,} tokens, but the model is made for {config.max_position_embeddings:,}; "
            "convert it with a longer --context"
        )
    if config.position_chunk and any(stage.context for stage in plan.curriculum):
        raise InputError(
            "config: a stage has a context, which scales positions; the model's are in dual chunks, which nothing "
            "scales: leave it out"
        )


def starting_point(plan: TrainConfig) -> tuple["NSAConfig", dict[str, "Tensor"], Path, str]:
    """Config and float32 weights, the directory that has the tokenizer, and an identity of the weights."""
    import torch

    from nsa_models import NSAConfig, load_model, load_tokenizer
    from nsa_models.training.student import float_weights, fresh_weights

    if plan.model is not None:
        directory = resolve_model(plan.model)
        model = load_model(directory, "cpu", torch.float32)
        return model.config, float_weights(model), directory, model.fingerprint
    directory = resolve_model(plan.tokenizer)
    tokenizer = load_tokenizer(directory)
    values = {"vocab_size": tokenizer.vocab_size, "eos_token_ids": tokenizer.eos_ids} | dict(plan.fresh)
    config = NSAConfig.from_dict(values)
    return config, fresh_weights(config, plan.seed), directory, f"fresh {plan.seed}"


def teacher(plan: TrainConfig, config: "NSAConfig", start: dict, device, dtype) -> "Teacher":
    from nsa_models import load_model
    from nsa_models.training.loop import Teacher
    from nsa_models.training.student import float_weights

    weights = start
    if plan.teacher.model:
        model = load_model(resolve_model(plan.teacher.model), "cpu")
        student, config = config, model.config
        if config.vocab_size != student.vocab_size:
            raise ModelError(
                f"{plan.teacher.model}: a teacher needs the student's vocabulary of {student.vocab_size:,}"
            )
        if plan.loss.hidden and (config.num_hidden_layers, config.hidden_size) != (
            student.num_hidden_layers,
            student.hidden_size,
        ):
            raise ModelError(f"{plan.teacher.model}: loss.hidden needs a teacher of the student's layers and width")
        weights = float_weights(model)
    scaling = config.rope_scaling
    made_for = scaling.original_max_position_embeddings if scaling else config.max_position_embeddings
    weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    return Teacher(config, weights, plan.teacher.max_length or made_for)


def identity(plan: TrainConfig, *parts: object) -> str:
    """Of everything that a step depends on. Where and how often states are saved is not part of it."""
    values = asdict(replace(plan, out="", save_every=1, keep=1))
    return hashlib.sha256(json.dumps([values, *parts], default=str, sort_keys=True).encode()).hexdigest()


def run(trainer: "Trainer", end: float | None) -> bool:
    """Train, with a bar that shows loss, tokens/s and the time left. Ctrl-C stops after the step at hand.

    end: of the slice, by time.monotonic(); the step that would pass it is not begun.
    """
    slowest, interrupted = 0.0, False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it at once

    def stop() -> bool:
        out_of_time = end is not None and time.monotonic() + slowest > end
        return interrupted or out_of_time

    before = signal.signal(signal.SIGINT, interrupt)
    if trainer.step and trainer.group.rank == 0:
        say(f"nsa: going on after step {trainer.step:,}")
    try:
        with bar(trainer) as show:

            def report(record: dict) -> None:
                nonlocal slowest
                slowest = max(slowest, record["seconds"])
                if trainer.group.rank == 0:
                    show(record)

            done = trainer.run(stop, report)
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted and not done:
        draw(trainer)
        say(f"nsa: step {trainer.step:,} is saved; the same command goes on")
        raise KeyboardInterrupt
    return done


@contextmanager
def bar(trainer: "Trainer") -> Iterator[Callable[[dict], None]]:
    """Yield what shows a step's record: a bar on a terminal, elsewhere a line on stderr at each tenth of the run."""
    total, first = trainer.plan.steps, trainer.step
    if shows_bars():
        from tqdm import tqdm

        with tqdm(
            desc="training", total=total, initial=first, unit=" steps", dynamic_ncols=True, file=sys.stderr
        ) as own:

            def draw_bar(record: dict) -> None:
                own.set_postfix_str(rate_of(record), refresh=False)
                own.update(record["step"] - own.n)

            yield draw_bar
        return
    start, shown = time.monotonic(), first * 10 // total

    def line(record: dict) -> None:
        nonlocal shown
        step = record["step"]
        if step * 10 // total > shown or step == first + 1:
            shown = step * 10 // total
            left = (time.monotonic() - start) / (step - first) * (total - step)
            say(f"step {step:,} of {total:,}: {rate_of(record)}, {format_seconds(left)} left")

    yield line


def rate_of(record: dict) -> str:
    return f"loss {record['loss']:.3f}, {record['tokens'] / max(record['seconds'], 1e-9):,.0f} tokens/s"


def draw(trainer: "Trainer") -> None:
    """The loss plot, where matplotlib is installed."""
    from nsa_models.training.plot import NoPlot, plot_losses
    from nsa_models.training.state import PLOT

    try:
        plot_losses(trainer.folder.records(), trainer.folder.path / PLOT)
    except NoPlot as error:
        warn(str(error))


def write_outcome(trainer: "Trainer", start: dict, home: Path, fingerprint: str) -> None:
    """The run's checkpoint, in place of an earlier one, and its delta: what is other than it was."""
    import torch

    from nsa_models.checkpoint import save_checkpoint
    from nsa_models.delta import save_delta
    from nsa_models.dense import TOKENIZER_FILES
    from nsa_models.training.state import CHECKPOINT, DELTA

    plan, folder, student = trainer.plan, trainer.folder.path, trainer.student
    files = {name: (home / name).read_bytes() for name in TOKENIZER_FILES if (home / name).is_file()}
    save_checkpoint(folder / CHECKPOINT, student.config, student.merged(start), files, replace=True)
    if plan.delta:
        changes = student.changes().items()
        changes = {name: to for name, to in changes if name not in start or not torch.equal(to, start[name])}
        save_delta(folder / DELTA, changes, plan.delta.base_sha256 or fingerprint)
    click.echo(f"nsa: step {trainer.step:,} of {plan.steps:,}: {folder / CHECKPOINT}", err=True)
