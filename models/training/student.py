"""What is trained: which parameters of a model, in what form, and what becomes of them in the end."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nsa_models.config import NSAConfig
from nsa_models.convert import GATE_BIAS, gates
from nsa_models.delta import DOWN, UP
from nsa_models.errors import InputError
from nsa_models.training.config import TrainConfig
from nsa_models.transformer import NSAModel, parameter_shapes


def float_weights(model: NSAModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The model's parameters by name, int8 ones expanded."""
    weights = {}
    for name, tensor in model.state_dict().items():
        scale = getattr(model.get_submodule(name.rpartition(".")[0]), "weight_scale", None)
        tensor = tensor if scale is None or not name.endswith("weight") else tensor.float() * scale[:, None]
        weights[name] = tensor.to(dtype)
    return weights


def fresh_weights(config: NSAConfig, seed: int) -> dict[str, Tensor]:
    """Random weights: 0.02 for tables, 1/sqrt(inputs) for maps, norms of 1, gates half open, no scores."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        random = torch.randn(shape, generator=generator)
        if "norm." in name:
            weights[name] = torch.ones(shape)
        elif "g_proj" in name or name.endswith(("bias", "score")):
            weights[name] = torch.zeros(shape)
        elif "embeddings" in name or "position" in name:
            weights[name] = random * 0.02
        else:
            weights[name] = random * shape[-2 if "compress" in name else -1] ** -0.5
    return weights


class Student:
    """`weights`: every parameter by name, for `forward`; `trained`: those that learn, float32, a part of it.

    A delta's low-rank updates are parameters too: NAME.lora_up (zero at first) and NAME.lora_down.
    """

    def __init__(self, config: NSAConfig, start: Mapping[str, Tensor], plan: TrainConfig, device, dtype) -> None:
        self.config, self.plan = config, plan
        start = dict(start)
        if plan.gate_bias is not None:
            start |= {n: t * plan.gate_bias / GATE_BIAS for n, t in gates(config).items() if n in start}
        self.trained: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        for name, tensor in start.items():
            learns = plan.delta is None or is_nsa(name) or "norm." in name
            self.weights[name] = tensor.to(device, torch.float32 if learns else dtype, copy=True)
            if learns:
                self.trained[name] = self.weights[name].requires_grad_()
        chooses = plan.loss.next_token or any(".compress_k." in name for name in self.trained)
        if plan.loss.select and not chooses:
            raise InputError(
                "config: loss.select alone teaches compression, and the model's is the mean: nothing to learn; give "
                "loss.text or loss.answer a weight too, or use a model of nsa convert --compress-kind softmax"
            )
        if plan.delta and plan.delta.rank:
            self._add_updates(plan, device)

    def _add_updates(self, plan: TrainConfig, device) -> None:
        generator = torch.Generator().manual_seed(plan.seed)
        for name in list(self.weights):
            if name.split(".")[-2] in plan.delta.maps and name.endswith(".weight"):
                outside, inside = self.weights[name].shape
                down = torch.randn(plan.delta.rank, inside, generator=generator) * inside**-0.5
                for part, tensor in ((UP, torch.zeros(outside, plan.delta.rank)), (DOWN, down)):
                    self.trained[name + part] = tensor.to(device).requires_grad_()
        self.weights |= self.trained

    def changes(self) -> dict[str, Tensor]:
        """What training made, by name: a delta's tensors, or all."""
        return {name: tensor.detach().cpu() for name, tensor in self.trained.items()}

    def merged(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole checkpoint's float32 tensors: `start` with the changes."""
        changes = self.changes()
        merged = {name: changes.get(name, tensor.float().cpu()) for name, tensor in start.items()}
        for name in start:
            if name + UP in changes:
                merged[name] = merged[name] + changes[name + UP] @ changes[name + DOWN]
        return merged


def is_nsa(name: str) -> bool:
    """Gates and compression: what an NSA model has and a dense one has not."""
    return ".g_proj." in name or ".compress_" in name
