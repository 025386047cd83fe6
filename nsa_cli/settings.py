"""Where things live on this machine, and which checkpoint a name means."""

import os
from pathlib import Path

from platformdirs import user_cache_path, user_config_path, user_data_path

from nsa_models.errors import ModelError

BUILTIN = "smollm2-135m-nsa"


def data_dir() -> Path:
    """Installed checkpoints: $NSA_DATA_DIR, else the user's data directory."""
    return Path(os.environ.get("NSA_DATA_DIR") or user_data_path("nsa", appauthor=False))


def cache_dir() -> Path:
    """Stored contexts: $NSA_CACHE_DIR, else the user's cache directory."""
    return Path(os.environ.get("NSA_CACHE_DIR") or user_cache_path("nsa", appauthor=False))


def config_dir() -> Path:
    """What the user has set and written: $NSA_CONFIG_DIR, else the user's configuration directory."""
    return Path(os.environ.get("NSA_CONFIG_DIR") or user_config_path("nsa", appauthor=False))


def models_dir() -> Path:
    return data_dir() / "models"


def resolve_model(name: str | None) -> Path:
    """A checkpoint directory: a path to one, or the name of an installed model; None = the built-in model."""
    name = name or BUILTIN
    installed = models_dir() / name
    for candidate in (Path(name), installed):
        if (candidate / "config.json").is_file():
            return candidate
    if name == BUILTIN:
        raise ModelError(f"model {name} is not installed; run: nsa models install")
    raise ModelError(f"no checkpoint {name}: neither a directory with config.json nor one of: nsa models ls")
