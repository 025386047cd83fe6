"""A document as models, tasks and readers know it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """`path` as it is shown (posix, relative to the directory that was named); lines of `text` end in \\n."""

    path: str
    text: str
