"""How long reading takes on this machine: by arithmetic, and by how long it took the last time. Imports no torch."""

import json
from contextlib import suppress
from pathlib import Path

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.output import write_atomically

FILE = "speed.json"  # model -> seconds that its last reading took, over those of `nominal`
LEAST_TOKENS = 1024  # fewer say more about starting up
# Operations per second on 2 cores of AMD Zen 5: within 4 % of the 2,027, 1,999 and 1,501 tokens/s of the built-in model
# at 8k, 32k and 128k. Machines some years older take up to twice as long.
LINEAR_RATE = 630e9
ATTENTION_RATE = 770e9
SLOWER = 2.0


def nominal(checkpoint: Checkpoint, tokens: int) -> float:
    """Seconds of reading so many tokens on the machine above."""
    from nsa_models.cost import attention_operations, linear_parameters

    config = checkpoint.config
    linear = 2 * linear_parameters(config) * tokens / LINEAR_RATE
    return linear + attention_operations(config, tokens) / ATTENTION_RATE


def expected(directory: Path, checkpoint: Checkpoint, tokens: int) -> tuple[float, float, bool]:
    """Least and most seconds of reading so many tokens, and whether they come from this model's last reading here."""
    seconds, ratio = nominal(checkpoint, tokens), _ratios(directory).get(checkpoint.name)
    if isinstance(ratio, float) and ratio > 0:
        return seconds * ratio, seconds * ratio, True
    return seconds, seconds * SLOWER, False


def remember(directory: Path, checkpoint: Checkpoint, start: int, stop: int, seconds: float) -> None:
    """Note that tokens start..stop-1 took so long. Nothing is noted of a few, or where nothing can be written."""
    if stop - start < LEAST_TOKENS:
        return
    ratio = seconds / (nominal(checkpoint, stop) - nominal(checkpoint, start))
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        ratios = _ratios(directory) | {checkpoint.name: round(ratio, 3)}
        write_atomically(directory / FILE, json.dumps(ratios).encode())


def _ratios(directory: Path) -> dict:
    try:
        found = json.loads((directory / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
