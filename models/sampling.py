"""From logits to the next token: greedy by default, or sampled under the usual filters. Imports torch late."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy and ignores the filters and the seed."""

    temperature: float = 0.0
    top_p: float = 1.0  # keep the smallest set whose probability reaches top_p
    top_k: int = 0  # keep the k likeliest; 0 = all
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the likeliest
    repeat_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens generated before
    seed: int = 0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name, low, high in (("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {getattr(self, name)}")
        if self.temperature < 0 or self.repeat_penalty <= 0 or self.top_k < 0 or self.max_tokens < 1:
            raise ValueError("temperature and top_k must be at least 0, repeat_penalty above 0, max_tokens at least 1")


class Sampler:
    """Draws tokens one after the other; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, history: Iterable[int] = ()) -> None:
        import torch

        self.sampling = sampling
        self.seen = set(history)
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def pick(self, logits) -> int:
        """logits: (vocab,). Returns the chosen id and remembers it for the repeat penalty."""
        plain = self.sampling.temperature == 0 and self.sampling.repeat_penalty == 1.0
        token = int(logits.argmax()) if plain else self._pick(logits.float().cpu())  # one number from the device
        self.seen.add(token)
        return token

    def _pick(self, logits) -> int:
        import torch

        s = self.sampling
        if s.repeat_penalty != 1.0 and self.seen:
            index = torch.tensor(sorted(self.seen))
            value = logits[index]
            logits = logits.clone()
            logits[index] = torch.where(value > 0, value / s.repeat_penalty, value * s.repeat_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        probability, index = torch.softmax(logits / s.temperature, -1).sort(descending=True)
        keep = torch.ones_like(probability, dtype=torch.bool)
        if s.top_k:
            keep[s.top_k :] = False
        keep &= probability.cumsum(0) - probability < s.top_p  # mass before this token
        keep &= probability >= s.min_p * probability[0]
        keep[0] = True
        probability = probability * keep
        return int(index[torch.multinomial(probability, 1, generator=self.generator)])
