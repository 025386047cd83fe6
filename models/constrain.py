"""Which tokens may come next so that the text is of a grammar: a mask over the logits of every step.

The grammar is JSON of a schema, or text that makes no paths up. It fails closed. A schema that the grammar library
cannot enforce as a whole is refused before anything is generated, and where no token is allowed any more there is an
error, never a step without a mask.
"""

import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from nsa_models.errors import CheckError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_models.tokenizer import Tokenizer

# One space after separators, as in most text that models were trained on, and nowhere else: free whitespace lets a
# model that is unsure fill its answer with line ends.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# A text in which a word that begins with a folder is a path that is known. Words are what paths are made of; behind a
# known one may stand what ends a sentence.
PATHS = r"""
start: TEXT
TEXT: (WORD? GAP)* WORD?
GAP: /[^\w.\/-]+/
WORD: /({known})[.\/]*/ | (/[\w.\/-]+/ & ~/({folders})\/[\w.\/-]*/)
"""


class Constraint:
    """The state of one answer: `mask` before a token is chosen, `advance` with it."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, grammar: str, name: str = "JSON schema") -> None:
        """vocab_size: the logits'. name: of the grammar, for errors. Raises InputError if it cannot be enforced."""
        import llguidance
        import torch

        self.name, self._matcher = name, llguidance.LLMatcher(tokenizer.for_grammars(vocab_size), grammar, log_level=0)
        if self._matcher.is_error():
            raise InputError(f"this {name} cannot be enforced: {_reason(self._matcher)}")
        self._bits = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def mask(self, logits: "Tensor") -> "Tensor":
        """logits (vocab,) in float32 on the CPU, -inf where a token is not allowed. Raises CheckError if none is."""
        import torch

        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)
        self._refuse_errors()
        allowed = (self._bits[:, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten()[: logits.shape[0]].bool()
        if not allowed.any():
            raise CheckError(f"the {self.name} allows no further token")
        return logits.float().cpu().masked_fill(~allowed, float("-inf"))

    def advance(self, token: int) -> None:
        """`token` was chosen."""
        self._matcher.consume_token(token)
        self._refuse_errors()

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            raise CheckError(f"the {self.name} could not be followed: {_reason(self._matcher)}")


def of_schema(schema: dict) -> str:
    """The grammar of JSON of a schema."""
    import llguidance

    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=LAYOUT)


def of_paths(paths: Iterable[str]) -> str | None:
    """The grammar of texts that name, in the folders of these paths, nothing but them and the folders on their way;
    None if none of them has a folder.
    """
    import llguidance

    known = {str(part) for path in paths for part in (PurePosixPath(path), *PurePosixPath(path).parents) if part.parts}
    folders = {path.partition("/")[0] for path in known if re.match(r"[\w.-]+/", path)}
    if not folders:
        return None
    patterns = ("|".join(map(_pattern, sorted(some))) for some in (known, folders))
    grammar = PATHS.format(**dict(zip(("known", "folders"), patterns, strict=True)))
    return llguidance.LLMatcher.grammar_from_lark(grammar)


def _pattern(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _reason(matcher) -> str:
    return matcher.get_error().strip().splitlines()[0].rstrip(".")
