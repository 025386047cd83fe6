"""The parts of the loss, over rows in pieces, so that no (T, vocab) table of a long batch is ever held."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nsa_models.training.batch import Batch

PIECE = 2048  # rows; times 49,152 tokens of vocabulary in float32 are 400 MB

Head = Callable[[Tensor], Tensor]  # (rows, H) -> (rows, vocab) float32


def token_losses(
    batch: Batch, student: Tensor, head: Head, teacher: Tensor | None, teacher_head: Head | None, taught: Tensor | None
) -> dict[str, Tensor]:
    """Means over the rows they concern: `text` and `answer` (cross entropy), with a teacher `kl`.

    student, teacher: last hidden states (T, H). taught: (T,) bool, rows that have a teacher. A part that concerns no
    row is absent.
    """
    has_next = batch.targets >= 0
    rows = {"text": has_next & ~batch.asked, "answer": batch.answers}
    found = {}
    for name, mask in rows.items():
        if mask.any():
            found[name] = _mean(_cross_entropy, mask, (student, batch.targets), head)
    if teacher is not None:
        mask = has_next & ~batch.answers & taught
        if mask.any():
            divergence = functools.partial(_divergence, teacher_head=teacher_head)
            found["kl"] = _mean(divergence, mask, (student, teacher), head)
    return found


def _mean(function: Callable[..., Tensor], mask: Tensor, inputs: tuple[Tensor, Tensor], head: Head) -> Tensor:
    """function's sum over the masked rows, piece by piece, divided by their number."""
    index = mask.nonzero()[:, 0]
    total = 0.0
    for piece in index.split(PIECE):
        total = total + checkpoint(function, *(x[piece] for x in inputs), head, use_reentrant=False)
    return total / index.shape[0]


def _cross_entropy(x: Tensor, targets: Tensor, head: Head) -> Tensor:
    return functional.cross_entropy(head(x), targets, reduction="sum")


def _divergence(student: Tensor, teacher: Tensor, head: Head, teacher_head: Head) -> Tensor:
    with torch.no_grad():
        target = functional.log_softmax(teacher_head(teacher), -1)
    return functional.kl_div(functional.log_softmax(head(student), -1), target, reduction="sum", log_target=True)


def hidden_loss(student: list[Tensor], teacher: list[Tensor], taught: Tensor) -> Tensor:
    """Squared distance of the layers' outputs from the teacher's over the teacher's square, a mean over layers."""
    parts = [
        (s[taught] - t[taught]).float().square().sum() / t[taught].float().square().sum().clamp(min=1e-12)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).mean()
