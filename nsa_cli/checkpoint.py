"""The checkpoint that a command works with: found by name, loaded part by part. Imports torch late."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cli.output import say
from nsa_cli.settings import resolve_model
from nsa_models.errors import ModelError

if TYPE_CHECKING:
    from nsa_models import NSAConfig, NSAModel
    from nsa_models.tokenizer import Tokenizer


class Checkpoint:
    """A checkpoint by name. Each part is read when first asked for, so that a mistake in the input costs no time."""

    def __init__(
        self,
        name: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        dtype: str | None = None,
        template: str | None = None,
    ) -> None:
        """None = what fits the checkpoint and the machine. template: a chat template, "" = a plain layout."""
        self.requested, self.device, self.threads, self.dtype, self.template = name, device, threads, dtype, template

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @cached_property
    def directory(self) -> Path:
        return resolve_model(self.requested)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        from nsa_models import load_tokenizer

        tokenizer = load_tokenizer(self.directory, self.template)
        if not tokenizer.has_chat_template and self.template is None:
            say(f"nsa: {self.name} has no chat template; asking in a plain layout: document, Question:, Answer:")
        return tokenizer

    @cached_property
    def config(self) -> "NSAConfig":
        from nsa_models.formats import read_config

        return read_config(self.directory)

    @cached_property
    def model(self) -> "NSAModel":
        import torch

        from nsa_models import load_model

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelError("no CUDA device was found; leave out --device to use the CPU")
        if self.threads:
            torch.set_num_threads(self.threads)
        return load_model(self.directory, self.device, self.dtype and getattr(torch, self.dtype))

    @property
    def identity(self) -> str:
        """What answers depend on: the weights, and what was asked for in place of the checkpoint's own."""
        return " ".join(filter(None, (self.model.fingerprint, self.dtype, self.template)))

    @property
    def loaded(self) -> bool:
        return "model" in vars(self)

    @property
    def on_gpu(self) -> bool:
        import torch

        return self.device != "cpu" and torch.cuda.is_available()

    def free_memory(self) -> int:
        """Bytes free where the model computes; on a GPU with those that torch keeps for what comes."""
        if self.on_gpu:
            import torch

            return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        import psutil

        return psutil.virtual_memory().available

    def weights_bytes(self) -> int:
        """What the weights take there; a GPU has them in two bytes each, however they are stored."""
        from nsa_models.cost import parameter_count
        from nsa_models.formats import weights_bytes

        return 2 * parameter_count(self.config) if self.on_gpu else weights_bytes(self.directory)
