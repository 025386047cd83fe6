"""Text that a program wrote for a program: minified, encoded or generated."""

import re

LONGEST_LINE = 5_000  # characters; a hand-written line of code is far shorter
# Lines of base64 are 64 or 76 characters long; nothing that people write has as many without a space.
ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{60,}")
HEAD = 2_000  # characters in which a generator says so
GENERATED = re.compile(
    r"^[\s/#*;<!-]*@generated\b|(?:auto-?)?generated\b.{0,200}?\bdo(?: not|n't) (?:edit|modify|change)"
    r"|\bdo(?: not|n't) (?:edit|modify)\b.{0,200}?(?:auto-?)?generated\b",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)


# A picture in a page, a key in a configuration. Tried where a run begins: runs of 999 took 0.4 s a MB, not 0.008.
DATA = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{1000,}={0,2}")


def without_data(text: str) -> tuple[str, int]:
    """The text with each long run of base64 or the like named in its place, and their characters."""
    total = sum(len(match[0]) for match in DATA.finditer(text))
    return DATA.sub(lambda match: f"({len(match[0]):,} characters of data)", text) if total else text, total


def machine_made(text: str, prose: bool) -> tuple[str, str] | None:
    """(kind, what it is) of text that nobody wrote to be read; None for all other. prose: long lines are normal."""
    if GENERATED.search(text, 0, HEAD):
        return "generated", "generated code, as its first lines say"
    encoded = sum(len(match[0]) for match in ENCODED.finditer(text))
    if encoded * 2 > len(text) and len(text) > 500:
        return "encoded", f"{encoded * 100 // len(text)} % base64 or the like"
    longest = max(map(len, text.split("\n"))) if not prose and len(text) > LONGEST_LINE else 0
    if longest > LONGEST_LINE:
        return "minified", f"minified: a line of {longest:,} characters"
    return None
