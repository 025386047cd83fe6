"""`TrainConfig`: what `nsa train CONFIG.yaml` reads, key by key. Imports no torch."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin

from nsa_models.errors import InputError

LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Stage:
    """A step of the length curriculum."""

    steps: int  # optimizer steps
    length: int  # longest sequence, tokens
    batch_tokens: int = 0  # tokens that one pass computes, sequences packed; 0 = length
    accumulate: int = 1  # passes per optimizer step
    task_share: float | None = None  # in place of the data's, as the next
    reread_share: float | None = None
    context: int = 0  # tokens: RoPE is scaled (YaRN) as in a context of so many, where that is longer than the sequence

    def shares(self, data: "Data") -> tuple[float, float]:
        """Of tasks among the sequences, and of passages among the tasks."""
        own = ((self.task_share, data.task_share), (self.reread_share, data.reread_share))
        tasks, reread = (every if here is None else here for here, every in own)
        return tasks, reread


@dataclass(frozen=True)
class Loss:
    """Weights of the parts of the loss. A part of weight 0 is not computed."""

    text: float = 1.0  # next token, on texts
    answer: float = 1.0  # next token, on the answers of tasks
    kl: float = 0.0  # KL(teacher || student) of the next token, everywhere but on answers
    hidden: float = 0.0  # squared distance of the layers' outputs from the teacher's, over their square
    select: float = 0.0  # KL(dense attention || importance) over blocks (see `selection`): alone it trains compression,
    #   beside another part also the queries and keys that are compared

    @property
    def next_token(self) -> bool:
        """Whether a part concerns what the model predicts, so that gradients have to pass through it."""
        return max(self.text, self.answer, self.kl, self.hidden) > 0


@dataclass(frozen=True)
class Teacher:
    """Full attention over a dense model's weights."""

    model: str | None = None  # its converted checkpoint; None = the weights that training starts from
    max_length: int = 0  # sequences longer than this have no teacher; 0 = what the dense model was made for


@dataclass(frozen=True)
class Delta:
    """Train gates, compression and norms in full and add low-rank updates to linear maps; the rest stays."""

    rank: int = 16  # of the updates; 0 = none
    maps: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    base_sha256: str | None = None  # what the delta says it belongs to; None = the starting checkpoint's fingerprint


@dataclass(frozen=True)
class Optimizer:
    """AdamW over float32 weights, linear warm-up, cosine to `final` times the rate."""

    rate: float = 1e-4
    nsa_rate: float = 1e-3  # of gates and compression
    warmup: int = 20  # steps
    final: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # of the norm of all gradients


@dataclass(frozen=True)
class Text:
    """Documents to learn from: a source known by name (`nsa train --sources`), or files and folders."""

    source: str | None = None
    path: str | None = None
    weight: float = 1.0  # how often it is drawn from, beside the others


@dataclass(frozen=True)
class Data:
    """What sequences are made of."""

    texts: tuple[Text, ...] = ()
    tasks: Mapping[str, float] = field(default_factory=dict)  # kind -> weight
    task_share: float = 0.0  # of all sequences
    reread_share: float = 0.0  # of the tasks: not the texts but the passages that `nsa ask` would read again
    follow_ups: int = 0  # after a task that is laid out so: more that its passages answer, one after another
    reworded_share: float = 0.0  # of the tasks: asked in other words than `nsa eval` uses
    cited: bool = False  # answers end with where they are from, as `nsa` prints it: (path:line)
    held_out: tuple[str, ...] = ()  # .gitignore patterns of document paths that are never trained on


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    out: str  # folder of the run: states, metrics, plot, and in the end the checkpoint
    curriculum: tuple[Stage, ...]
    data: Data
    model: str | None = None  # checkpoint to start from: a directory or the name of an installed model
    fresh: Mapping[str, object] | None = None  # or: config.json keys of a new model with random weights
    tokenizer: str | None = None  # of a fresh model: a checkpoint directory or the name of an installed model
    gate_bias: float | None = None  # start with gates of + this (selected) and - this (the others); converted ones
    #   have 14, where a sigmoid is flat: nothing would be learned
    delta: Delta | None = None  # None = train every parameter
    loss: Loss = Loss()
    teacher: Teacher = Teacher()
    optimizer: Optimizer = Optimizer()
    dtype: str = "auto"  # of activations: float32, bfloat16; auto = bfloat16 on a GPU
    recompute: bool = True  # activation checkpointing: a third more time, a fraction of the memory
    save_every: int = 50  # steps between saved states
    keep: int = 2  # saved states
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) == (self.fresh is None):
            raise InputError("config: give either model (a checkpoint to start from) or fresh (a new model's shape)")
        if self.fresh is not None and self.tokenizer is None:
            raise InputError("config: a fresh model needs a tokenizer: a checkpoint directory that has one")
        if self.fresh is not None and (self.delta or self.teacher_wanted and self.teacher.model is None):
            raise InputError("config: a fresh model has no base: delta is not for it, and a teacher needs its model")
        if not self.curriculum:
            raise InputError("config: curriculum is empty; give at least one stage: steps and length")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"config: dtype must be auto, float32 or bfloat16, got {self.dtype!r}")
        for name in self.delta.maps if self.delta else ():
            if name not in LINEAR_MAPS:
                raise InputError(f"config: delta.maps: {_unknown(name, LINEAR_MAPS)}")
        for where, values, names in self._limits():
            for name in names:
                if getattr(values, name) < 0:
                    raise InputError(f"config: {where}{name} must not be negative, got {getattr(values, name)}")
        for stage in self.curriculum:
            if min(stage.batch_tokens, stage.context) < 0:
                raise InputError(f"config: a stage's batch_tokens and context must not be negative: {stage}")
            if min(stage.steps, stage.accumulate) < 1 or stage.length < 2:
                raise InputError(
                    f"config: a stage needs steps and accumulate of at least 1, length of at least 2: {stage}"
                )
            for name in ("task_share", "reread_share"):
                if not 0 <= (getattr(stage, name) or 0) <= 1:
                    raise InputError(f"config: a stage's {name} must lie between 0 and 1: {stage}")
            if stage.batch_tokens and stage.batch_tokens < stage.length:
                raise InputError(f"config: batch_tokens must hold a sequence of length: {stage}")
        if min(self.save_every, self.keep) < 1:
            raise InputError("config: save_every and keep must be at least 1")
        for name in ("task_share", "reread_share", "reworded_share"):
            if not 0 <= getattr(self.data, name) <= 1:
                raise InputError(f"config: data.{name} must lie between 0 and 1, got {getattr(self.data, name)}")
        if max(self.data.task_share, *(stage.task_share or 0 for stage in self.curriculum)) and not self.data.tasks:
            raise InputError("config: task_share needs data.tasks: kinds of task and their weights")
        for text in self.data.texts:
            if (text.source is None) == (text.path is None):
                raise InputError("config: each of data.texts needs either source (a known name) or path")

    def _limits(self):
        yield "optimizer.", self.optimizer, [f.name for f in fields(Optimizer)]
        yield "loss.", self.loss, [f.name for f in fields(Loss)]
        yield "teacher.", self.teacher, ["max_length"]
        yield "data.", self.data, ["follow_ups"]
        if self.delta:
            yield "delta.", self.delta, ["rank"]
        for text in self.data.texts:
            yield "data.texts.", text, ["weight"]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.curriculum)

    @property
    def rereads(self) -> bool:
        """Whether tasks are laid out as passages."""
        return self.data.reread_share > 0 or any(stage.reread_share for stage in self.curriculum)

    @property
    def teacher_wanted(self) -> bool:
        return self.loss.kl > 0 or self.loss.hidden > 0

    def stage(self, step: int) -> Stage:
        """The stage that optimizer step `step` (from 0) belongs to."""
        for stage in self.curriculum:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError("no such step")


def read_train_config(path: Path) -> TrainConfig:
    """The config in a YAML file. Raises InputError: unreadable, not YAML, unknown key, wrong type."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1})" if mark else ""
        raise InputError(f"{path}: not YAML{at}: {getattr(error, 'problem', None) or error}") from None
    try:
        return build(TrainConfig, values, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def build(kind: type, values: object, where: str):
    """A dataclass from a mapping, checked key by key and type by type; `where` names it in messages."""
    if not isinstance(values, Mapping):
        raise InputError(f"config: {where.rstrip('.') or 'the file'} must be a mapping of keys to values")
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise InputError(f"config: {_unknown(where + str(key), [where + name for name in known])}")
    missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values]
    if missing:
        raise InputError(f"config: missing {', '.join(where + name for name in missing)}")
    return kind(**{key: _value(known[key].type, value, where + key) for key, value in values.items()})


def _unknown(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def _value(kind: type, value: object, where: str):
    """`value` as what the field's annotation says."""
    options = [a for a in get_args(kind) if a is not type(None)] if type(None) in get_args(kind) else [kind]
    if value is None and type(None) in get_args(kind):
        return None
    (kind,) = options
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise InputError(f"config: {where} must be a list")
        return tuple(_value(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise InputError(f"config: {where} must be a mapping of keys to values")
        of = get_args(kind)[1]
        return {str(k): v if of is object else _value(of, v, f"{where}.{k}") for k, v in value.items()}
    if kind in (Stage, Loss, Teacher, Delta, Optimizer, Text, Data):
        return build(kind, value, f"{where}.")
    return _plain(kind, value, where)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _plain(kind: type, value: object, where: str):
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a text
        try:
            value = float(value)
        except ValueError:
            value = str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or value != value:
        raise InputError(f"config: {where} must be {_NAMES[kind]}, got {value!r}")
    return value
