"""The training loop: batches in, a trained student out, resumable at every saved state bit for bit.

Nothing here is random: a batch is a function of its index (see `data`), weights start from a seed, and no layer drops
anything. So weights, the optimizer's moments and the step are all there is to save.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_models.config import NSAConfig
from nsa_models.errors import ModelError, NSAError
from nsa_models.training.batch import Batch
from nsa_models.training.config import Optimizer, TrainConfig
from nsa_models.training.forward import Weights, hidden_states, output_logits
from nsa_models.training.losses import hidden_loss, token_losses
from nsa_models.training.selection import SelectionLoss, selection_loss
from nsa_models.training.state import RunFolder
from nsa_models.training.student import Student, is_nsa


@dataclass(frozen=True)
class Teacher:
    """Dense attention over weights that do not change."""

    config: NSAConfig
    weights: Weights
    max_length: int  # longer sequences have no teacher


@dataclass(frozen=True)
class Group:
    """The processes that train together, as `torchrun` starts them; gradients are averaged over them."""

    rank: int = 0
    size: int = 1

    def average(self, tensors: list[Tensor]) -> None:
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


class Trainer:
    """`run` trains from the last saved state on. batches: index -> Batch, the same for the same index, always."""

    def __init__(
        self,
        plan: TrainConfig,
        student: Student,
        batches: Callable[[int, int], Batch],
        folder: RunFolder,
        teacher: Teacher | None = None,
        *,
        identity: str = "",
        group: Group = Group(),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """batches: (step, index) -> Batch; index counts passes over all stages and processes. identity: of
        everything that training depends on; a state of another one is refused.
        """
        self.plan, self.student, self.batches, self.folder, self.teacher = plan, student, batches, folder, teacher
        self.identity, self.group, self.device, self.dtype = identity, group, torch.device(device), dtype
        self.optimizer = make_optimizer(plan.optimizer, student.trained)
        self.step = 0
        self._resume()

    def _resume(self) -> None:
        found = self.folder.load()
        if found is None:
            return
        step, state = found
        if state["identity"] != self.identity:
            raise ModelError(
                f"{self.folder.path}: its states are of another config, model or data; name another out, or remove it"
            )
        with torch.no_grad():
            for name, tensor in self.student.trained.items():
                tensor.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = step
        if self.group.rank == 0:
            self.folder.rewind(step)

    def run(
        self, stop: Callable[[], bool] = lambda: False, report: Callable[[dict], None] = lambda record: None
    ) -> bool:
        """Train to the end (True) or until `stop` (False), asked after every step; what was done is saved either way.

        report: gets each step's record, the line that goes to the metrics. Raises NSAError for a loss that is no
        number and for a disk that is full: the last good state stays.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with closing(ahead(self.batches, self._calls())) as batches:
            return self._run(batches, stop, report)

    def _run(self, batches: Iterator[Batch], stop: Callable[[], bool], report: Callable[[dict], None]) -> bool:
        while self.step < self.plan.steps:
            record = self.advance(batches)
            if self.group.rank == 0:
                self.folder.log(record)
            report(record)
            stopped = self._agree(stop())
            if stopped or self.step % self.plan.save_every == 0 or self.step == self.plan.steps:
                self.save()
            if stopped:
                return self.step == self.plan.steps
        return True

    def _agree(self, stopped: bool) -> bool:
        """Whether any process wants to stop."""
        if self.group.size == 1:
            return stopped
        flag = torch.tensor(float(stopped), device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag)

    def save(self) -> None:
        if self.group.rank == 0:
            weights, optimizer = self.student.changes(), self.optimizer.state_dict()
            self.folder.save(self.step, {"identity": self.identity, "weights": weights, "optimizer": optimizer})

    def _calls(self) -> Iterator[tuple[int, int]]:
        """Step and index of every batch of this process that is still to come."""
        for step in range(self.step, self.plan.steps):
            for i in range(self.plan.stage(step).accumulate):
                yield step, (self._passes_before(step) + i) * self.group.size + self.group.rank

    def advance(self, batches: Iterator[Batch]) -> dict:
        """One optimizer step on the next batches; returns its record."""
        start = time.perf_counter()
        stage = self.plan.stage(self.step)
        self.optimizer.zero_grad()
        sums: dict[str, float] = {}
        tokens = 0
        for _ in range(stage.accumulate):
            batch = next(batches).to(self.device)
            parts = self.losses(batch)
            loss = self._total(parts)
            if not math.isfinite(loss.item()):
                raise NSAError(
                    f"step {self.step + 1:,}: the loss is {loss.item()}; {self.folder.last_good()}: "
                    "lower optimizer.rate, or lengthen warmup"
                )
            (loss / stage.accumulate).backward()
            tokens += batch.tokens
            for name, value in parts.items() | {("loss", loss)}:
                sums[name] = sums.get(name, 0.0) + value.item() / stage.accumulate
        rate = self._apply()
        self.step += 1
        seconds = time.perf_counter() - start
        record = {"step": self.step, **{name: round(sums[name], 6) for name in sorted(sums)}, **rate}
        return record | {"tokens": tokens * self.group.size, "length": stage.length, "seconds": round(seconds, 3)}

    def _passes_before(self, step: int) -> int:
        return sum(self.plan.stage(s).accumulate for s in range(step))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss that the plan weighs, on one batch."""
        if self.plan.loss.next_token:
            return self._predictions(batch)
        choice = selection_loss(self.student.config, self.student.weights, batch, self.dtype)
        return {} if choice is None else {"select": choice}

    def _predictions(self, batch: Batch) -> dict[str, Tensor]:
        """Of the next tokens, and of the layers and choices on the way to them."""
        plan, taught_layers, layers = self.plan, [], []
        keep = plan.loss.hidden > 0
        taught, guide = None, None
        if self.teacher is not None:
            taught = torch.tensor([n <= self.teacher.max_length for n in batch.lengths], device=batch.ids.device)
            taught = taught.repeat_interleave(torch.tensor(batch.lengths, device=batch.ids.device))
            if taught.any():
                guide = self._guide(batch, taught_layers if keep else None)
        watch = SelectionLoss(self.student.config, batch) if plan.loss.select else None
        x = hidden_states(
            self.student.config,
            self.student.weights,
            batch.ids,
            batch.lengths,
            context=batch.context,
            dtype=self.dtype,
            recompute=plan.recompute,
            each=(lambda _, x: layers.append(x)) if guide is not None and keep else lambda _, x: None,
            watch=watch,
        )
        heads = [self._head(self.student.config, self.student.weights)]
        heads.append(self._head(self.teacher.config, self.teacher.weights) if guide is not None else None)
        parts = token_losses(batch, x, heads[0], guide if plan.loss.kl else None, heads[1], taught)
        if guide is not None and keep:
            parts["hidden"] = hidden_loss(layers, taught_layers, taught)
        if watch is not None and watch.mean is not None:
            parts["select"] = watch.mean
        return {name: part for name, part in parts.items() if getattr(plan.loss, name)}

    @torch.no_grad()
    def _guide(self, batch: Batch, layers: list | None) -> Tensor:
        """The teacher's last hidden states; its layers' outputs go to `layers`."""
        each = (lambda _, x: layers.append(x)) if layers is not None else lambda _, x: None
        teacher = self.teacher
        return hidden_states(
            teacher.config, teacher.weights, batch.ids, batch.lengths, dtype=self.dtype, dense=True, each=each
        )

    @staticmethod
    def _head(config: NSAConfig, weights: Weights) -> Callable[[Tensor], Tensor]:
        return lambda x: output_logits(config, weights, x)

    def _total(self, parts: Mapping[str, Tensor]) -> Tensor:
        if not parts:
            raise NSAError(
                "no part of the loss concerns this batch; give loss.text, loss.answer or loss.kl a weight, or longer "
                "sequences"
            )
        return sum(getattr(self.plan.loss, name) * part for name, part in parts.items())

    def _apply(self) -> dict[str, float]:
        """Average, clip, step. Returns the gradients' norm and the rate."""
        plan = self.plan.optimizer
        gradients = [t.grad if t.grad is not None else t.new_zeros(t.shape) for t in self.student.trained.values()]
        self.group.average(gradients)
        for tensor, gradient in zip(self.student.trained.values(), gradients, strict=True):
            tensor.grad = gradient
        limit = plan.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.student.trained.values()), limit).item()
        if not math.isfinite(norm):
            raise NSAError(
                f"step {self.step + 1:,}: the gradients' norm is {norm}; {self.folder.last_good()}: "
                "lower optimizer.rate"
            )
        factor = rate_factor(plan, self.step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * factor
        self.optimizer.step()
        return {"norm": round(norm, 6), "rate": plan.rate * factor}


def ahead(make: Callable[[int, int], Batch], calls: Iterable[tuple[int, int]]) -> Iterator[Batch]:
    """make(*call) of every call in order; the next is made in a thread while the last is computed on.

    One core makes 40,000 to 110,000 tokens a second of sequences at 4k to 128k: a GPU would wait for them.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for call in calls:
            following = pool.submit(make, *call)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def make_optimizer(plan: Optimizer, trained: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """AdamW with a rate of its own for gates and compression; no decay of vectors."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in trained.items():
        rate = plan.nsa_rate if is_nsa(name) else plan.rate
        groups.setdefault((rate, plan.weight_decay if tensor.dim() > 1 else 0.0), []).append(tensor)
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "full_rate": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        betas=(plan.beta1, plan.beta2),
        eps=1e-10,  # gates near their bounds have gradients of 1e-8
    )


def rate_factor(plan: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from 1 to `final`."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(steps - plan.warmup, 1)
    return plan.final + (1 - plan.final) * 0.5 * (1 + math.cos(math.pi * done))
