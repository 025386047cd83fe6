"""Questions and answers about one context, one after the other, as a conversation."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cli.budget import check_fit, document_room
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.conversation import Conversation, Turn
from nsa_cli.output import emit, say, silent, write_atomically
from nsa_cli.reply import SCHEMA_VERSION, show
from nsa_cli.request import Request
from nsa_cli.text_file import read_text
from nsa_models.errors import BudgetError, InputError

if TYPE_CHECKING:
    from nsa_cli.context import Context
    from nsa_models.tokenizer import Tokenizer

ROOM = 8192  # tokens for what is said, where the model's limit leaves them
HELP = (
    "/undo takes the last question back, /reset begins a new conversation about the same text, /quit or Ctrl-D ends, "
    "Ctrl-C stops an answer"
)


def begin(checkpoint: Checkpoint, context: "Context", request: Request) -> Conversation:
    """Read the context, with room for a conversation behind it. BudgetError if it does not fit with one answer."""
    room = document_room(checkpoint, "", request) - len(context.ids)
    around = sum(map(len, checkpoint.tokenizer.prompt("", request.system)))
    capacity = around + len(context.ids) + request.sampling.max_tokens + max(min(room, ROOM), 0)
    check_fit(checkpoint, context, "", request, capacity)
    return Conversation(checkpoint, context, request, capacity)


Keep = Callable[[Sequence[Turn]], None]


def chat(
    conversation: Conversation, lines: Iterable[str], as_json: bool, patient: bool, keep: Keep = lambda turns: None
) -> None:
    """Answer each line until one says /quit. patient: someone types, so that a mistake or Ctrl-C ends no more than the
    answer; else it ends the conversation. keep: gets all turns whenever they have changed.
    """
    for line in lines:
        said = line.strip()
        if said == "/quit":
            return
        if said == "/reset":
            conversation.reset()
            keep(conversation.turns)
            say("nsa: a new conversation")
        elif said == "/undo":
            _undo(conversation)
            keep(conversation.turns)
        elif said.startswith("/"):
            say(f"nsa: {HELP}")
        elif said:
            _answer(conversation, said, as_json, patient, keep)


def _undo(conversation: Conversation) -> None:
    if not conversation.turns:
        say("nsa: there is nothing to take back")
        return
    *before, last = conversation.turns
    conversation.resume(before)
    say(f"nsa: taken back: {last.question}")


def _answer(conversation: Conversation, question: str, as_json: bool, patient: bool, keep: Keep) -> None:
    try:
        reply = conversation.ask(question, silent if as_json else emit)
        keep(conversation.turns)
        show(reply, as_json)
    except BudgetError as error:
        if not patient:
            raise
        say(f"nsa: {error}; /reset begins a new one")
    except KeyboardInterrupt:
        if not patient or conversation.unread is None:  # it was still reading
            raise


def save_turns(path: Path, turns: Sequence[Turn]) -> None:
    """A JSON line a turn. The tokens go with it: the same text may be made of others, and be followed by others."""
    lines = [
        {"schema_version": SCHEMA_VERSION, "question": turn.question, "answer": turn.answer, "tokens": turn.ids}
        for turn in turns
    ]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def load_turns(path: Path, tokenizer: "Tokenizer") -> list[Turn]:
    """What `save_turns` wrote, none if there is no such file. Where the answer is not what the tokens say (someone
    has changed it, or the model is another), its text counts. Raises InputError.
    """
    if not path.exists():
        return []
    lines = read_text(path).splitlines()
    return [_turn(line, f"{path} line {number}", tokenizer) for number, line in enumerate(lines, 1) if line.strip()]


def _turn(line: str, where: str, tokenizer: "Tokenizer") -> Turn:
    try:
        turn = json.loads(line)
        question, answer, ids = turn["question"], turn["answer"], turn.get("tokens", [])
        known = all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        if not (isinstance(question, str) and isinstance(answer, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f'{where}: not a turn of a conversation, such as {{"question": "...", "answer": "..."}}'
        ) from None
    same = known and tokenizer.decode(ids).strip() == answer.strip()
    return Turn(question, answer, ids if same else tokenizer.encode(answer))
