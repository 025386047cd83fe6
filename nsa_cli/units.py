"""Quantities as people type and read them: 128k tokens, 1M bytes."""

import re

import click

SUFFIXES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parse_quantity(text: str) -> int:
    """`131072`, `128k` (128000), `128Ki` (131072), `1.5M`: a whole number of at least 1; else a usage error."""
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kmg]i?|)b?", str(text).strip(), re.IGNORECASE)
    value = round(float(re.sub("[_,]", "", match[1])) * SUFFIXES[match[2].lower()]) if match else 0
    if value < 1:
        raise click.BadParameter(f"{text!r} is not a quantity; write 131072, 128k (128000) or 128Ki (131072)")
    return value


def format_bytes(count: int) -> str:
    """Three digits at most and a unit of 1000s: `3.2 MB`."""
    for unit, size in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"
    return f"{count} bytes"


def format_seconds(seconds: float) -> str:
    """`12 s`, `4 min`, `1.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
