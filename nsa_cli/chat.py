"""Questions and answers about one context, one after the other, as a conversation."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nsa_cli.answer import Conversation, Request, check_fit, document_room, show, silent
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.output import emit, say
from nsa_models.errors import BudgetError

if TYPE_CHECKING:
    from nsa_cli.context import Context

ROOM = 8192  # tokens for what is said, where the model's limit leaves them
HELP = "/reset begins a new conversation about the same text, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def begin(checkpoint: Checkpoint, context: "Context", request: Request) -> Conversation:
    """Read the context, with room for a conversation behind it. BudgetError if it does not fit with one answer."""
    room = document_room(checkpoint, "", request) - len(context.ids)
    around = sum(map(len, checkpoint.tokenizer.prompt("", request.system)))
    capacity = around + len(context.ids) + request.sampling.max_tokens + max(min(room, ROOM), 0)
    check_fit(checkpoint, context, "", request, capacity)
    return Conversation(checkpoint, context, request, capacity)


def chat(conversation: Conversation, lines: Iterable[str], as_json: bool, patient: bool) -> None:
    """Answer each line until one says /quit. patient: someone types, so that a mistake or Ctrl-C ends no more than the
    answer; else it ends the conversation.
    """
    for line in lines:
        said = line.strip()
        if said == "/quit":
            return
        if said == "/reset":
            conversation.reset()
            say("nsa: a new conversation")
        elif said.startswith("/"):
            say(f"nsa: {HELP}")
        elif said:
            _answer(conversation, said, as_json, patient)


def _answer(conversation: Conversation, question: str, as_json: bool, patient: bool) -> None:
    try:
        show(conversation.ask(question, silent if as_json else emit), as_json)
    except BudgetError as error:
        if not patient:
            raise
        say(f"nsa: {error}; /reset begins a new one")
    except KeyboardInterrupt:
        if not patient or conversation.unread is None:  # it was still reading
            raise
