"""Strings that end an answer, found while it comes piece by piece."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string; holds back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string."""
        if self.found:
            return ""
        text, self.held = self.held + text, ""
        hits = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if hits:
            self.found = True
            return text[: min(hits)]
        starts = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        cut = len(text) - max(starts, default=0)
        self.held = text[cut:]
        return text[:cut]

    def end(self) -> str:
        """What was held back, when no text will follow."""
        text, self.held = self.held, ""
        return text
