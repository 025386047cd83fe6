"""Which tokens may come next so that the text is JSON of a schema: a mask over the logits of every step.

It fails closed. A schema that the grammar library cannot enforce as a whole is refused before anything is generated,
and where no token is allowed any more there is an error, never a step without a mask.
"""

import json
from typing import TYPE_CHECKING

from nsa_models.errors import CheckError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_models.tokenizer import Tokenizer

# One space after separators, as in most text that models were trained on, and nowhere else: free whitespace lets a
# model that is unsure fill its answer with line ends.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """The state of one answer: `mask` before a token is chosen, `advance` with it."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, schema: dict) -> None:
        """vocab_size: the logits'. Raises InputError if the schema cannot be enforced."""
        import llguidance
        import torch

        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=LAYOUT)
        self._matcher = llguidance.LLMatcher(tokenizer.for_grammars(vocab_size), grammar, log_level=0)
        if self._matcher.is_error():
            raise InputError(f"this JSON schema cannot be enforced: {_reason(self._matcher)}")
        self._bits = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def mask(self, logits: "Tensor") -> "Tensor":
        """logits (vocab,) in float32 on the CPU, -inf where a token is not allowed. Raises CheckError if none is."""
        import torch

        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)
        self._refuse_errors()
        allowed = (self._bits[:, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten()[: logits.shape[0]].bool()
        if not allowed.any():
            raise CheckError("the JSON schema allows no further token")
        return logits.float().cpu().masked_fill(~allowed, float("-inf"))

    def advance(self, token: int) -> None:
        """`token` was chosen."""
        self._matcher.consume_token(token)
        self._refuse_errors()

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            raise CheckError(f"the JSON schema could not be followed: {_reason(self._matcher)}")


def _reason(matcher) -> str:
    return matcher.get_error().strip().splitlines()[0].rstrip(".")
