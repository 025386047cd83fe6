"""How to answer a question, apart from the question and the document."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nsa_cli.held import Held
from nsa_models.sampling import Sampling

if TYPE_CHECKING:
    from nsa_cli.schema import Schema

STORE_MODES = ("use", "read", "refresh", "off")  # of stored contexts


@dataclass(frozen=True)
class Request:
    """How to answer, apart from the question and the document."""

    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    system: str | None = None  # None = the chat template's own
    max_context: int | None = None  # most tokens of prompt and answer; None = what the model was made for
    store: str = "use"  # STORE_MODES
    evidence: int = 5  # most places to name
    reread: int | None = None  # tokens of the passages that the answer comes from; 0 = of all; None = the checkpoint's
    held: Held | None = None  # keeps what was read in memory, for the next question about it
    schema: "Schema | None" = None  # the answer is JSON of this schema
    fit: bool = False  # max_context is what free memory holds, if that is less

    def of_all(self) -> "Request":
        """The same for what concerns a whole text and is seldom at a few places: reread only if it says so."""
        return replace(self, reread=self.reread or 0)

    def wording(self, question: str) -> str:
        """The question as the model gets it."""
        return f"{question}\n\n{self.schema.instruction()}" if self.schema else question
